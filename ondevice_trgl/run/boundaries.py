"""The boundary that the module in training reads, and the one that it writes: at most two stand at a time."""

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ondevice_trgl.cache.base import BoundaryCache
from ondevice_trgl.cache.codec import codec_for
from ondevice_trgl.cache.disk import DiskCache
from ondevice_trgl.cache.memory import MemoryCache
from ondevice_trgl.cache.seal import chunk_rows
from ondevice_trgl.config import TrainConfig
from ondevice_trgl.data.augment import Augmented
from ondevice_trgl.run.batches import Source, epoch_order, shuffled_by_chunk

SPLITS = ("train", "val", "test")


class Boundaries:
    """Sources of every split at one boundary, starting at the dataset (boundary 0).

    With `views`, the training samples are kept in several, each as a split of its own; "train" is view 0. What is kept
    in memory is pinned where it is `for_gpu`. Of files, `room()` is what the kernel may hold in RAM; None is all.
    """

    def __init__(
        self,
        data: Mapping[str, Source],
        tier: str,
        dtype: str,
        folder: Path,
        views: Augmented | None = None,
        *,
        for_gpu: bool = False,
        room: Callable[[], int] | None = None,
        by_chunk: bool = False,
    ) -> None:
        self._views, self._for_gpu, self._room, self._by_chunk = views, for_gpu, room, by_chunk
        self.data = data if views is None else {**data, **{f"view{k}": views.view(k) for k in range(1, views.count)}}
        self.tier, self.dtype, self.folder = tier, dtype, folder
        self._read: dict[str, BoundaryCache] = {}
        self._written: dict[str, BoundaryCache] = {}
        self.index = 0
        """The boundary that `source` reads: 0 is the dataset, k the output of module k - 1."""
        self.written_bytes = 0
        """To disk, by this object."""

    def source(self, split: str) -> Source:
        return self._read[split] if self.index else self.data[split]

    def training(self, epoch: int) -> Source:
        """The training samples of epoch `epoch`: of the dataset a view of its own, of a cache one of those kept."""
        if self._views is None:
            return self.source("train")
        if not self.index:
            return self._views.view(epoch)
        number = epoch % self._views.count
        return self.source(f"view{number}" if number else "train")

    def order(self, epoch: int, config: TrainConfig, *key: int) -> list[int]:
        """The samples of `training(epoch)` in the order of that epoch, which depends on `key` and the settings."""
        source = self.training(epoch)
        if self._by_chunk and isinstance(source, BoundaryCache):
            return shuffled_by_chunk(source.rows, chunk_rows(source.row_bytes), config.seed, *key, epoch)
        return epoch_order(source.labels, config.seed, *key, epoch=epoch, balance=config.balance)

    @property
    def splits(self) -> tuple[str, ...]:
        """Whatever is kept, views of training samples included."""
        return (*self.judged, *(split for split in self.data if split not in SPLITS))

    @property
    def judged(self) -> tuple[str, ...]:
        """The splits that have accuracies."""
        return tuple(split for split in SPLITS if split in self.data)

    @property
    def lap(self) -> int:
        """That which views are drawn for."""
        return 0 if self._views is None else self._views.lap

    def begin_lap(self, lap: int) -> None:
        """Back to the dataset, whose views are drawn anew."""
        if self._views is not None:
            self._views.lap = lap
        self.rewind()

    def append(self, split: str, shape: tuple[int, ...], activations: Tensor, labels: Tensor) -> None:
        """Add a batch to the next boundary. Raises StorageError."""
        if split not in self._written:
            rows, dtype = len(self.data[split].labels), self._dtype_for(activations)
            self._written[split] = self._new(split, rows, shape, dtype)
        cache = self._written[split]
        before = cache.bytes_written
        cache.append(activations, labels)
        if self.tier != "memory":
            self.written_bytes += cache.bytes_written - before

    def _dtype_for(self, activations: Tensor) -> str:
        """That of the first split, or what its first batch stands; in memory there is no room for a wider one."""
        if self.tier == "memory":
            return self.dtype
        known = next((cache.dtype for cache in self._written.values()), None)
        return known or codec_for(self.dtype, activations).dtype

    def _new(self, split: str, rows: int, shape: tuple[int, ...], dtype: str) -> BoundaryCache:
        if self.tier == "memory":
            return MemoryCache(rows, shape, dtype, for_gpu=self._for_gpu)
        return self._settled(DiskCache(self.path(self.index + 1, split), rows, shape, dtype))

    def _settled(self, cache: DiskCache) -> DiskCache:
        """`cache`, with its part of what may be in RAM: two boundaries stand at a time."""
        rows = sum(len(source.labels) for source in self.data.values())
        share = None if self._room is None else self._room() * cache.rows // (2 * rows)
        cache.pages.most = None if share is None or share >= cache.rows * cache.row_bytes else share
        cache.pages.by_chunk = self._by_chunk
        return cache

    def spill(self) -> None:
        """Keep on disk from now on what is in memory. Raises StorageError; what could not be moved stays."""
        for caches, index in ((self._read, self.index), (self._written, self.index + 1)):
            for split, cache in caches.items():
                if isinstance(cache, MemoryCache):
                    caches[split] = moved = self._settled(DiskCache.moved(self.path(index, split), cache))
                    self.written_bytes += moved.row_bytes * moved.rows
        self.tier = "disk"

    def path(self, index: int, split: str) -> Path:
        """The file of boundary `index`, where it is on disk."""
        return self.folder / f"boundary-{index:03d}-{split}.bin"

    def kept_as(self) -> tuple[str, float]:
        """(number format, share that was lost at most, see `Codec.error`) of what was written of the next boundary."""
        dtype = next((cache.dtype for cache in self._written.values()), self.dtype)
        return dtype, max((cache.lost for cache in self._written.values()), default=0.0)

    def traffic(self) -> tuple[int, int]:
        """Bytes (read from this boundary, written to the next) so far."""
        read = sum(cache.bytes_read for cache in self._read.values())
        return read, sum(cache.bytes_written for cache in self._written.values())

    def advance(self, by: int = 1, *, producer: str = "") -> None:
        """What was written, `by` modules further on, becomes what is read; the boundary before is deleted.

        With `producer`, a digest of what put it out, it is sealed for a later sitting to take up. Raises StorageError.
        """
        for cache in self._written.values():
            cache.seal(producer)
        _close(self._read)
        self._read, self._written = self._written, {}
        self.index += by

    def take_up(self, index: int, sealed: Mapping[str, BoundaryCache]) -> None:
        """Read boundary `index` from what an earlier sitting left of every split; what else it left is deleted."""
        self.close()
        self._read, self.index = dict(sealed), index
        for cache in sealed.values():
            if isinstance(cache, DiskCache):
                self._settled(cache)
        kept = {self.path(index, split).stem for split in sealed}
        for path in self.folder.glob("boundary-*"):
            if path.stem not in kept and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)  # nothing of ours
            elif path.stem not in kept:
                with contextlib.suppress(OSError):
                    path.unlink()

    def rewind(self) -> None:
        """Back to the dataset."""
        self.close()
        self.index = 0

    def close(self, *, keep: bool = False) -> None:
        """Delete every activation; with `keep`, but for what is sealed and was read."""
        _close(self._read, keep=keep)
        _close(self._written)
        self._read, self._written = {}, {}


def _close(caches: dict[str, BoundaryCache], *, keep: bool = False) -> None:
    for cache in caches.values():
        cache.close(keep=keep)


def ahead(source: Source, indices: Sequence[int]) -> None:
    """Samples of `source` that will be read next: what is on disk comes into the page cache meanwhile."""
    if isinstance(source, BoundaryCache) and indices:
        source.ahead(indices)
