"""Batches of fixed shape from a boundary: the dataset, or a cache of activations."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ondevice_trgl.data.splits import SUBTRACT_ONE, check_targets_vary, class_name
from ondevice_trgl.errors import DataError, NonFiniteError


class Source(Protocol):
    """Samples at one boundary: `labels` int64 (rows,) or targets float32 (rows, T), `shape` of one sample."""

    labels: Tensor
    shape: tuple[int, ...]

    def read(self, indices: Sequence[int], out: Tensor) -> Tensor:
        """Fill out[:len(indices)]; returns their labels."""
        ...


def buffer_for(micro_batch: int, shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
    """An input buffer of a module, (micro_batch, *shape), reused for every batch; `pinned` for copies to a GPU."""
    return torch.zeros((micro_batch, *shape), dtype=dtype, pin_memory=pinned)


def shuffled(rows: int, *key: int) -> list[int]:
    """A permutation of range(rows) that depends on `key` (seed, lap, module, epoch) alone."""
    generator = torch.Generator()
    generator.manual_seed(mix(*key))
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    return order


_CHUNKS_AT_A_TIME = 32


def shuffled_by_chunk(rows: int, chunk: int, *key: int) -> list[int]:
    """A permutation of range(rows) in which those of a chunk of so many are near each other; by `key` alone.

    Chunks come in random order, and at any time samples are drawn from the same number of them. Memory: four numbers of
    8 bytes a sample beside the list, while it is made.
    """
    generator = torch.Generator().manual_seed(mix(*key))
    turn = torch.randperm(-(-rows // chunk), generator=generator).to(torch.float64)
    when = turn.repeat_interleave(chunk)[:rows]
    when += _CHUNKS_AT_A_TIME * torch.rand(rows, generator=generator, dtype=torch.float64)
    order: list[int] = when.argsort().tolist()
    return order


def epoch_order(labels: Tensor, *key: int, epoch: int, balance: bool) -> list[int]:
    """The samples of an epoch in order, as many as there are labels; it depends on these arguments alone.

    Without `balance` each sample once. With it each class equally often, but for a rest of one that goes round from
    epoch to epoch; of a class no sample comes again before all were drawn, over the epochs of one `key`. Classes take
    turns, so that batches are even too. Memory: five numbers of 8 bytes a sample beside the list, while it is made.
    """
    if not balance:
        return shuffled(len(labels), *key, epoch)
    sizes = torch.bincount(labels)
    present = sizes.nonzero().flatten().tolist()
    turns, rest = divmod(len(labels), len(present))
    queue, first = shuffled(len(present), *key), epoch * rest
    extra = [queue[(first + place) % len(present)] for place in range(rest)]
    among, before = set(extra), [0] * len(present)  # how often a class was among the rest
    for place, at in enumerate(queue):
        before[at] = (first + len(present) - 1 - place) // len(present)
    members = labels.argsort(stable=True).split(sizes[present].tolist())
    drawn = torch.empty(len(present), turns + 1, dtype=torch.int64)
    for at, own in enumerate(members):
        start, count = epoch * turns + before[at], turns + (at in among)
        drawn[at, :count] = _draws(own, start, count, *key, present[at])
    generator = torch.Generator().manual_seed(mix(*key, epoch, 4))
    order = torch.rand(turns, len(present), generator=generator).argsort(dim=1)
    chosen: list[int] = drawn.gather(0, order.t()).t().flatten().tolist()
    chosen += drawn[extra, turns].tolist()
    return chosen


def _draws(own: Tensor, start: int, count: int, *key: int) -> Tensor:
    """Number `start` to `start + count - 1` of an endless row of permutations of `own`."""
    if len(own) == 1:
        return own.expand(count)
    lap, skipped = divmod(start, len(own))
    laps = range(lap, lap + -(-(skipped + count) // len(own)))
    orders = [own[shuffled(len(own), *key, number)] for number in laps]
    return torch.cat([own[:0], *orders])[skipped : skipped + count]


def mix(*key: int) -> int:
    """A 63-bit seed from several numbers; neighbouring keys give unrelated seeds (splitmix64)."""
    state = 0x9E3779B97F4A7C15
    for number in key:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def train_batches(
    source: Source, order: Sequence[int], batch: int, buffer: Tensor
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """For each full batch in `order`, its micro-batches (z, labels); z is `buffer`, overwritten by the next."""
    for start in range(0, len(order) - batch + 1, batch):
        yield micro_batches(source, order[start : start + batch], buffer)


def micro_batches(source: Source, indices: Sequence[int], buffer: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples `indices` in micro-batches (z, labels) as large as `buffer`, which is overwritten by the next."""
    micro = len(buffer)
    for at in range(0, len(indices), micro):
        yield buffer, source.read(indices[at : at + micro], buffer)


def all_rows(source: Source, buffer: Tensor) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """(z, labels, start, count) over every row in order. The last z is padded with what was there before."""
    rows = len(source.labels)
    for start in range(0, rows, len(buffer)):
        count = min(len(buffer), rows - start)
        yield buffer, source.read(range(start, start + count), buffer), start, count


def check_labels(labels: Tensor, classes: int, what: str, names: Sequence[str] = ()) -> None:
    """Raises DataError for an empty set, a label out of range, or a single class; `names` of the classes, if known.

    Of targets, for another number of them than the model has outputs, or ones that never change.
    """
    if len(labels) == 0:
        raise DataError(f"the {what} set is empty", hint="give it at least one sample of every class")
    if labels.is_floating_point():
        if labels.shape[1] != classes:
            raise DataError(
                f"the {what} set has {labels.shape[1]} targets a sample, the model has {classes} outputs",
                hint=f"give the model {labels.shape[1]} outputs; numbers of classes have to be whole: int(label)",
            )
        if what == "train":
            check_targets_vary(labels, what="the train set")
        return
    low, high = int(labels.min()), int(labels.max())
    if low == 1 and high == classes:
        raise DataError(
            f"the labels of the {what} set go from 1 to {classes}, expected 0 to {classes - 1}", hint=SUBTRACT_ONE
        )
    if low < 0 or high >= classes:
        bad = low if low < 0 else high
        at = int((labels == bad).nonzero()[0])
        raise DataError(
            f"label {bad} of {what} sample {at} is out of range: the model has {classes} outputs",
            hint=f"labels are whole numbers from 0 to {classes - 1}; or give the model more outputs",
        )
    if what == "train" and low == high:
        raise DataError(
            f"all {len(labels)} train samples are of {class_name(low, names)}: there is nothing to learn",
            hint="give samples of at least two classes",
        )


def check_finite(z: Tensor, indices: Sequence[int], where: str) -> None:
    """Raises NonFiniteError that names the first sample with NaN or infinity; integers always pass."""
    if not z.is_floating_point():
        return
    for row, index in zip(z, indices, strict=False):
        if not bool(torch.isfinite(row).all()):
            kind = "NaN" if bool(torch.isnan(row).any()) else "infinity"
            raise NonFiniteError(f"{kind} in {where}, sample {index}", hint="clean the data, then resume the run")


def place(index: int, split: str) -> str:
    """The data of `split` at boundary `index`, in words."""
    data = {"train": "training", "val": "validation"}.get(split, split)
    return f"the {data} data" if index == 0 else f"boundary {index} ({data} data)"
