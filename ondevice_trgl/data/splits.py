"""Which sample goes where, and whether the labels make sense. Everything here works on labels alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ondevice_trgl.errors import DataError
from ondevice_trgl.tasks import AUTO, CLASSES, MULTI_LABEL, REGRESSION

SUBTRACT_ONE = "subtract 1 (for example target_transform=lambda y: y - 1)"


def shuffled(count: int, seed: int) -> Tensor:
    """0..count-1 in an order that depends on nothing but `count` and `seed`."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def carve(labels: Tensor, parts: Sequence[int], seed: int, *, what: str, names: Sequence[str] = ()) -> list[Tensor]:
    """Positions in an order of `seed`, in pieces: what is left to train on, then each of `parts` (sizes).

    Every class gives each part its share, rounded so that the sizes are as asked, and keeps one sample at least. Where
    there are not so many to give, the parts are smaller. Raises DataError where there is not one for each of them.
    """
    sizes = torch.bincount(labels)
    room = (sizes - 1).clamp_(min=0)
    if int(room.sum()) < len(parts):
        present = sizes.nonzero().flatten()
        smallest, aside = int(present[sizes[present].argmin()]), " and ".join(map(str, parts))
        raise DataError(
            f"{what} has {len(labels)} samples in {len(present)} classes: the smallest, {class_name(smallest, names)},"
            f" has {int(sizes[smallest])}; too few to put {aside} aside and keep one of each class to train on",
            hint="add samples, or bring validation and test sets of your own",
        )
    taken = _shares(sizes, room, _fitting(parts, int(room.sum())))
    order = shuffled(len(labels), seed)
    own = labels[order]
    ends = torch.cat([(sizes - taken.sum(0))[None], taken]).cumsum(0)[:-1]
    rank, piece = rank_in_class(own), torch.zeros_like(own)
    for end in ends:
        piece += rank >= end[own]
    return [order[piece == index] for index in range(1 + len(parts))]


def _fitting(parts: Sequence[int], room: int) -> list[int]:
    """`parts`, or what their proportions make of `room` where that is less than their sum; at least 1 each."""
    total = sum(parts)
    if total <= room:
        return list(parts)
    sizes = [max(1, part * room // total) for part in parts]
    while sum(sizes) > room:
        sizes[sizes.index(max(sizes))] -= 1
    return sizes


def _shares(sizes: Tensor, room: Tensor, parts: Sequence[int]) -> Tensor:
    """(parts, classes): how many of a class go into each part; of a class at most `room`.

    Largest remainders; what a class gave too little to one part, by rounding, it is the first to give to the next.
    """
    taken = torch.zeros(len(parts), len(sizes), dtype=torch.int64)
    wanted = 0
    for index, part in enumerate(parts):
        wanted += part
        given = taken.sum(0)
        owed = sizes.double() * wanted / int(sizes.sum()) - given
        free = room - given
        take = torch.minimum(owed.floor().long().clamp_(min=0), free)
        while missing := part - int(take.sum()):
            step = 1 if missing > 0 else -1
            able = (take < free) if missing > 0 else (take > 0)
            remainder = torch.where(able, step * (owed - take), -torch.inf)
            first = remainder.argsort(descending=True, stable=True)[: min(abs(missing), int(able.sum()))]
            take[first] += step
        taken[index] = take
    return taken


def rank_in_class(labels: Tensor) -> Tensor:
    """How many samples of its own class come before each; int64 (N,)."""
    by_class, sizes = labels.argsort(stable=True), torch.bincount(labels)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(by_class)
    rank[by_class] = torch.arange(len(labels)) - starts.repeat_interleave(sizes)
    return rank


def tenth(count: int) -> int:
    """The size of a split that is carved off where the dataset brings none: 10 %, at least one sample."""
    return max(1, count // 10)


def balanced_head(positions: Tensor, labels: Tensor, limit: int) -> Tensor:
    """`limit` of `positions`, in their order, with classes as even as the data allows.

    Takes the first sample of every class, then the second of every class, and so on.
    """
    if limit >= len(positions):
        return positions
    return positions[rank_in_class(labels[positions]).argsort(stable=True)[:limit].sort().values]


def class_name(label: int, names: Sequence[str]) -> str:
    """Class `label` in a message: by its name, or by its number where that is all that is known."""
    name = names[label] if 0 <= label < len(names) else str(label)
    return f"class {label}" if name == str(label) else name


def strata(labels: Tensor) -> Tensor:
    """What to keep in proportion when samples are divided, int64 (N,): classes; targets are all alike."""
    return torch.zeros(len(labels), dtype=torch.int64) if labels.is_floating_point() else labels


def check_task(found: str, asked: str, what: str) -> None:
    """Raises DataError where data are of another task than was stated; auto takes any."""
    if asked not in (AUTO, found):
        kinds = {CLASSES: "class numbers", REGRESSION: "float targets", MULTI_LABEL: "vectors of 0 and 1"}
        raise DataError(
            f"{what} has {kinds[found]}, for task = {found!r}; asked for was {asked!r}",
            hint=f"leave task out, and a loss that only it has; or give data with {kinds[asked]}",
        )


def check_labels(labels: Tensor, num_classes: int, *, what: str) -> None:
    """Raises DataError where there are no samples, or a label is not in 0..num_classes-1.

    Of targets all is known when they are read.
    """
    if len(labels) == 0:
        raise DataError(f"{what} is empty; expected at least one sample")
    if labels.is_floating_point():
        return
    if (low := int(labels.min())) == 1 and int(labels.max()) == num_classes:
        raise DataError(
            f"{what}: labels go from {low} to {num_classes}, expected 0 to {num_classes - 1}", hint=SUBTRACT_ONE
        )
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"{what}: {len(wrong)} labels are out of range, the first is {int(labels[first])} (sample {first});"
            f" expected 0..{num_classes - 1}",
            hint="number the classes from 0, and state how many there are",
        )


def check_zero_used(labels: Tensor, *, what: str) -> None:
    """Raises DataError where the labels to train on are 1 to N, each of them. Not for classes that somebody stated.

    Class 0 would never be trained, and most likely is none.
    """
    highest = int(labels.max())
    if int(labels.min()) == 1 and highest > 1 and int((torch.bincount(labels)[1:] > 0).sum()) == highest:
        raise DataError(
            f"{what}: labels go from 1 to {highest}, expected 0 to {highest - 1}",
            hint=f"{SUBTRACT_ONE}; or, if class 0 is meant to have no samples, let the dataset state `classes` or"
            f" `num_classes` (= {highest + 1})",
        )


def check_classes(labels: Tensor, *, what: str, names: Sequence[str] = ()) -> None:
    """Raises DataError where all samples are of one class or have the same targets: there would be nothing to learn."""
    if labels.is_floating_point():
        check_targets_vary(labels, what=what)
    elif int(labels.min()) == int(labels.max()):
        raise DataError(
            f"{what} has one class only: every one of its {len(labels)} labels is {class_name(int(labels[0]), names)}",
            hint="training needs at least two classes",
        )


def check_targets_vary(targets: Tensor, *, what: str) -> None:
    """Raises DataError where the targets (N, T) to train on are the same in every sample."""
    if bool((targets == targets[0]).all()):
        shown = ", ".join(f"{value:g}" for value in targets[0, :10].tolist())
        raise DataError(
            f"all {len(targets)} targets of {what} are {shown}: there is nothing to learn",
            hint="look at what they are made from",
        )
