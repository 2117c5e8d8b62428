"""Whose a boundary is, and how a later sitting takes it up.

A boundary is what the data and the modules in front of it make it: its producer is a digest of the samples' labels,
shapes and a few of their values, and of the weights and buffers of those modules as they are saved.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.cache.disk import DiskCache
from ondevice_trgl.model.store import state_of
from ondevice_trgl.model.tensorfile import digest_tensors
from ondevice_trgl.run.batches import Source
from ondevice_trgl.run.boundaries import Boundaries
from ondevice_trgl.run.context import Context
from ondevice_trgl.run.guards import outline
from ondevice_trgl.run.position import Position
from ondevice_trgl.run.sweep import sweep

_SAMPLED = 16
"""Samples of each split whose values are part of the digest."""
_MOST_DAMAGE = 0.5
"""Share of a boundary that is mended; where more is damaged, all of it is made again."""


class Lineage:
    """Producers of the boundaries of a run, by what is saved of its modules now."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._data: dict[int, str] = {}
        """By lap, as views are drawn for each."""
        self._modules: dict[int, tuple[tuple[int, ...], str]] = {}

    def of(self, boundary: int) -> str:
        """The producer of boundary `boundary`. Reads the weights of the modules in front, each once a save."""
        boundaries = self._context.boundaries
        if boundaries.lap not in self._data:
            with torch.random.fork_rng(devices=[]):  # a dataset may draw
                self._data[boundaries.lap] = _of_data(boundaries.data)
        digest = self._data[boundaries.lap]
        for index in range(boundary):
            digest = _digest(digest, self._of_module(index))
        return digest

    def _of_module(self, index: int) -> str:
        store = self._context.store
        saved = store.has(index)
        file = store.path(index) if saved else store.staged
        assert file is not None
        info = file.stat()
        stamp = (info.st_ino, info.st_size, info.st_mtime_ns)
        known = self._modules.get(index)
        if known is None or known[0] != stamp:
            own = {("module." if saved else "") + name for name in state_of(self._context.partition.modules[index])}
            known = self._modules[index] = (stamp, digest_tensors(file, own))
        return known[1]


class Rows:
    """Some rows of a source, as a source."""

    def __init__(self, source: Source, rows: Sequence[int]) -> None:
        self._source, self._rows = source, rows
        self.labels = source.labels[torch.as_tensor(rows, dtype=torch.int64)]
        self.shape = source.shape

    def read(self, indices: Sequence[int], out: Tensor) -> Tensor:
        """See `Source`."""
        return self._source.read([self._rows[index] for index in indices], out)


def take_up(context: Context, lineage: Lineage, index: int) -> None:
    """Have the boundaries read what an earlier sitting sealed of boundary `index`, or of the nearest before it.

    Chunks that are damaged are made again. Where nothing can be taken up, the dataset is what is read, and what lies in
    the folder is deleted. Memory: a chunk, about a megabyte; to mend, that of a sweep. Raises what `sweep` does.
    """
    boundaries = context.boundaries
    for boundary in range(index, 0, -1):
        if boundaries.tier != "disk" or not boundaries.path(boundary, "train").is_file():
            continue
        found = _sealed(context, boundary, lineage.of(boundary))
        damaged = {split: [row for rows in cache.damaged() for row in rows] for split, cache in found.items()}
        lost, rows = sum(map(len, damaged.values())), sum(cache.rows for cache in found.values())
        if found and lost <= _MOST_DAMAGE * rows:
            if lost:
                context.run.event("mended", boundary=boundary, rows=lost)
                try:
                    _mend(context, boundary, {split: found[split] for split in found if damaged[split]}, damaged)
                except BaseException:
                    for cache in found.values():
                        cache.close(keep=True)  # the next sitting mends it
                    raise
            boundaries.take_up(boundary, found)
            context.run.event("taken_up", boundary=boundary)
            return
        for cache in found.values():
            cache.close()
    boundaries.take_up(0, {})


def _sealed(context: Context, boundary: int, producer: str) -> dict[str, DiskCache]:
    """The boundary of every split; none where one of them is not there as it should be."""
    boundaries, found = context.boundaries, dict[str, DiskCache]()
    shape = context.partition.modules[boundary - 1].out_shape
    for split in boundaries.splits:
        labels, path = boundaries.data[split].labels, boundaries.path(boundary, split)
        cache = DiskCache.sealed(path, producer, shape, boundaries.dtype, labels)
        if cache is None:
            for one in found.values():
                one.close()
            return {}
        found[split] = cache
    return found


def _mend(
    context: Context, boundary: int, caches: Mapping[str, DiskCache], damaged: Mapping[str, Sequence[int]]
) -> None:
    """Pass the damaged rows from the dataset through the modules in front, and write what comes out."""
    rows: dict[str, Source] = {split: Rows(context.boundaries.data[split], damaged[split]) for split in caches}
    aside = Boundaries(rows, "disk", context.boundaries.dtype, context.boundaries.folder / "mending")
    try:
        for index in range(boundary):
            context.at(index)
            context.load(index)
            rung = Position.of(context.store, index).way(context.plan.ladders[index], context.budget.room)
            sweep(
                context.objective(index, rung), context.buffer(index, rung), aside, context.progress,
                context.partition.modules[index], context.device, context.budget, write=True, keep=None,
            )  # fmt: skip
            context.evict(index)
            aside.advance()
        for split, cache in caches.items():
            mended = aside.source(split)
            assert isinstance(mended, DiskCache)
            for at, number in enumerate(damaged[split]):
                cache.mend(number, mended, at)
                aside.written_bytes += cache.row_bytes
        context.boundaries.written_bytes += aside.written_bytes
    finally:
        aside.close()
        with contextlib.suppress(OSError):
            aside.folder.rmdir()


def _of_data(data: Mapping[str, Source]) -> str:
    """Of labels and shapes, and of the values of a few samples."""
    digest = json.dumps(outline(dict(data)), sort_keys=True)
    for split, source in sorted(data.items()):
        rows = len(source.labels)
        sample = torch.zeros(1, *source.shape)
        for row in {number * rows // _SAMPLED for number in range(min(rows, _SAMPLED))}:
            source.read([row], sample)
            values = hashlib.blake2b(bytes_of(sample), digest_size=16).hexdigest()
            digest = _digest(digest, f"{split} {row} {values}")
    return digest


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
