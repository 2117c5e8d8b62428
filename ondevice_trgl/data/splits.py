"""Which sample goes where, and whether the labels make sense. Everything here works on labels alone."""

import torch
from torch import Tensor

from ondevice_trgl.errors import DataError


def shuffled(count: int, seed: int) -> Tensor:
    """0..count-1 in an order that depends on nothing but `count` and `seed`."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def carve(count: int, parts: tuple[int, ...], seed: int, *, what: str) -> list[Tensor]:
    """Shuffle `count` positions; cut off `parts` (sizes) from the end; what is left comes first.

    Raises DataError where nothing would be left.
    """
    if count <= sum(parts):
        raise DataError(
            f"{what} has {count} samples; too few to put {' and '.join(map(str, parts))} aside",
            hint="add samples, or bring validation and test sets of your own",
        )
    order = shuffled(count, seed)
    return list(torch.split(order, [count - sum(parts), *parts]))


def tenth(count: int) -> int:
    """The size of a split that is carved off where the dataset brings none: 10 %, at least one sample."""
    return max(1, count // 10)


def balanced_head(positions: Tensor, labels: Tensor, limit: int) -> Tensor:
    """`limit` of `positions`, in their order, with classes as even as the data allows.

    Takes the first sample of every class, then the second of every class, and so on.
    """
    if limit >= len(positions):
        return positions
    by_class = labels[positions].argsort(stable=True)
    sizes = torch.bincount(labels[positions])
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(by_class)
    rank[by_class] = torch.arange(len(positions)) - starts.repeat_interleave(sizes)
    return positions[rank.argsort(stable=True)[:limit].sort().values]


def check_labels(labels: Tensor, num_classes: int, *, what: str) -> None:
    """Raises DataError where there are no samples, or a label is not in 0..num_classes-1."""
    if len(labels) == 0:
        raise DataError(f"{what} is empty; expected at least one sample")
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"{what}: {len(wrong)} labels are out of range, the first is {int(labels[first])} (sample {first});"
            f" expected 0..{num_classes - 1}",
            hint="number the classes from 0, and state how many there are",
        )


def check_classes(labels: Tensor, *, what: str, limit: int | None = None) -> None:
    """Raises DataError where all samples are of one class: there would be nothing to learn."""
    if int(labels.min()) == int(labels.max()):
        raise DataError(
            f"{what} has one class only: every one of its {len(labels)} labels is {int(labels[0])}",
            hint=f"raise the train limit of {limit}" if limit is not None else "training needs at least two classes",
        )
