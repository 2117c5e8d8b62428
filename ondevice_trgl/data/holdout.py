"""Data that a network was not trained on, brought to what its training data were; see Preprocessing."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ondevice_trgl.data.bundle import Asked
from ondevice_trgl.data.classes import MOST_NAMED, check_names, listing, numbered_classes, stated_classes
from ondevice_trgl.data.decode import Fit
from ondevice_trgl.data.images import ImageSet, PixelStats, StoredSet
from ondevice_trgl.data.preprocessing import Preprocessing
from ondevice_trgl.data.records import IN_MEMORY_BYTES, keep_records
from ondevice_trgl.data.samples import Samples
from ondevice_trgl.data.source import Part
from ondevice_trgl.data.splits import check_labels, check_task
from ondevice_trgl.data.targets import Targets
from ondevice_trgl.data.user import UserSet, scan
from ondevice_trgl.errors import DataError
from ondevice_trgl.tasks import CLASSES


@dataclass(frozen=True)
class Holdout:
    """Samples as the network wants them, with the labels that it knows."""

    samples: ImageSet
    told: tuple[str, ...]
    """What the data were found to be, for people: where from, classes that are missing, how names were matched."""


@dataclass(frozen=True)
class FilesToTell:
    """Picture files as the network wants them, without labels."""

    files: tuple[Path, ...]
    samples: ImageSet
    """In the order of `files`; all labels are 0."""
    told: str
    """What was found and what was left out, for people."""


def match_classes(
    names: Sequence[str], known: Preprocessing, *, what: str, by_order: bool = False
) -> tuple[Tensor, tuple[str, ...]]:
    """The network's label of each of `names`, int64, and what to tell of them.

    By name, in any case and Unicode form; with `by_order`, first to first.

    Raises DataError for names that the network has not, and for more classes than it has.
    """
    own = known.class_names
    if by_order:
        if len(names) > len(own):
            raise DataError(f"{what} has {len(names)} classes, the run was trained with {len(own)}: {listing(own)}")
        pairs = ", ".join(f"{name} as {mine}" for name, mine in zip(names[:MOST_NAMED], own, strict=False))
        more = f", and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        return torch.arange(len(names)), (f"classes by their order: {pairs}{more}",)
    exact = {name: label for label, name in enumerate(own)}
    alike = Counter(map(_plain, own))
    loose = {_plain(name): label for label, name in enumerate(own) if alike[_plain(name)] == 1}
    found = [exact.get(name, loose.get(_plain(name))) for name in names]
    unknown = [name for name, label in zip(names, found, strict=True) if label is None]
    if unknown:
        raise DataError(
            f"{what} has classes that the run was not trained with: {listing(unknown)}; the run's are {listing(own)}",
            hint="name them as in training, or insist on their order with --classes-from-order",
        )
    labels = [label for label in found if label is not None]
    twice = [own[label] for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise DataError(
            f"{what} has several classes that are called {listing(twice)} but for case: join or rename them"
        )
    return torch.tensor(labels, dtype=torch.int64), ()


def match_targets(
    names: Sequence[str], known: Preprocessing, *, what: str, by_order: bool = False
) -> tuple[Tensor, tuple[str, ...]]:
    """Which of the targets called `names` each of the network's is, int64 (T,), and what to tell of them.

    By name; with `by_order`, and where either are numbered alone, first to first. Raises DataError for others.
    """
    own, numbered = known.class_names, tuple(map(str, range(known.num_classes)))
    if len(names) != len(own):
        raise DataError(
            f"{what} has {len(names)} targets a sample ({listing(names)}), the run was trained with {len(own)}:"
            f" {listing(own)}"
        )
    if by_order or numbered in (own, tuple(names)):
        return torch.arange(len(own)), ()
    if unknown := [name for name in own if name not in names]:
        raise DataError(
            f"{what} has no targets {listing(unknown)}, which the run was trained with; it has {listing(names)}",
            hint="name them as in training, or insist on their order with --classes-from-order",
        )
    return torch.tensor([list(names).index(name) for name in own]), ()


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def without_samples(labels: Tensor, known: Preprocessing) -> tuple[str, ...]:
    """A line about the network's classes that no sample is of."""
    counts = torch.bincount(labels, minlength=known.num_classes)
    absent = [name for name, count in zip(known.class_names, counts.tolist(), strict=True) if not count]
    return (f"of these classes of the run there are no samples: {listing(absent)}",) if absent else ()


class _AsTrained(ImageSet):
    """`given` with the network's labels, or its targets in the network's order.

    With `stats`, bytes that it delivers as 0 to 1 are normalised by them.
    """

    def __init__(self, given: ImageSet, labels: Tensor, stats: PixelStats | None = None) -> None:
        self._map = labels
        super().__init__(self._mapped(given.labels), given.shape)
        self.task = given.task
        self.whole = given.whole if stats is None else None
        self._given = given
        if stats is not None:
            self._mean = torch.tensor(stats.mean).view(-1, 1, 1) / 255
            self._std = torch.tensor(stats.std).view(-1, 1, 1) / 255
        self._normalises = stats is not None

    def _mapped(self, labels: Tensor) -> Tensor:
        return labels[:, self._map] if labels.is_floating_point() else self._map[labels]

    def _fill(self, indices: list[int], out: Tensor) -> Tensor:
        labels = self._mapped(self._given.read(indices, out))
        if self._normalises:
            out.sub_(self._mean.to(out.device)).div_(self._std.to(out.device))
        return labels


def as_trained(
    samples: ImageSet,
    names: Sequence[str],
    origin: str,
    known: Preprocessing,
    *,
    what: str,
    by_order: bool,
    stats: PixelStats | None = None,
) -> Holdout:
    """`samples`, of classes called `names`, for the network; normalised by `stats` where these are given.

    Raises DataError as `match_classes` does, and for a shape that is not the network's.
    """
    _check_shape(samples.shape, known, what)
    check_task(samples.task, known.task, what)
    match = match_classes if known.task == CLASSES else match_targets
    labels, told = match(names, known, what=what, by_order=by_order)
    mapped = _AsTrained(samples, labels, stats)
    if known.task == CLASSES:
        told = (*told, *without_samples(mapped.labels, known))
    return Holdout(mapped, (f"{origin}: {len(mapped)} samples", *told))


def pictures(part: Part, known: Preprocessing, asked: Asked) -> ImageSet:
    """The records of `part`, pictures of the shape of the network's inputs, normalised as in training."""
    channels, height, width = known.input_shape
    wanted, stored = torch.arange(len(part.labels)), (channels, height, width)
    size = channels * height * width
    if part.records is not None and len(wanted) * size > IN_MEMORY_BYTES:
        records = part.records()
    else:
        records = keep_records(part.stream(), wanted, size, scratch_dir=asked.scratch_dir)
    read = StoredSet(records, wanted, part.labels, stored=stored, shape=stored, stats=stats_of(known, asked.name))
    read.task = known.task
    return read


def fit_of(known: Preprocessing, what: str) -> Fit:
    """What picture files become for the network. Raises DataError where its inputs are no pictures."""
    stats_of(known, what)
    if len(known.input_shape) != 3 or known.input_shape[0] not in (1, 3):
        shape = "x".join(map(str, known.input_shape))
        raise DataError(
            f"{what}: picture files have 1 or 3 channels, the run takes inputs of {shape}",
            hint="give data of the kind that it was trained with",
        )
    return Fit(*known.input_shape, known.orientation)


def stats_of(known: Preprocessing, what: str) -> PixelStats:
    """The training's mean and spread. Raises DataError where its inputs came from code, which alone knows them."""
    if known.mean is None or known.std is None:
        raise DataError(
            f"{what}: the run was trained with inputs that a dataset's own code made; how pictures become those is not"
            " known",
            hint="give a dataset as pkg.module:callable that makes them in the same way",
        )
    return PixelStats(known.mean, known.std)


def user_holdout(returned: Any, known: Preprocessing, asked: Asked, *, by_order: bool) -> Holdout:
    """What a caller's function returned: a dataset, measured whole, or the last of (train, val[, test]).

    Bytes become what they were in training. Raises DataError as `match_classes` does; and where samples are floats and
    the training's were pixels, as whether they are normalised cannot be told.
    """
    dataset = returned[-1] if isinstance(returned, tuple) and returned else returned
    part = f" ({('train', 'val', 'test')[min(len(returned), 3) - 1]})" if isinstance(returned, tuple) else ""
    what = f"{asked.name}{part}"
    given = Samples(dataset, name=what, targets=Targets(known.task))
    labels, whole, _ = scan(given)
    names = stated_classes(dataset, name=what)
    if given.targets.width is not None:
        check_names(names, given.targets.width, what)
        names = names or tuple(map(str, range(given.targets.width)))
    names = names or numbered_classes(int(labels.max()), samples=given.count, name=what)
    check_labels(labels, len(names), what=what)
    assert given.shape is not None
    shape = asked.delivered(given.shape)
    samples = UserSet(given, labels, torch.arange(len(labels)), shape=shape, num_classes=len(names), whole=whole)
    stats = None if known.mean is None else stats_of(known, what)
    dtype = given.given(0)[0].dtype
    if stats is not None and dtype != torch.uint8:
        raise DataError(
            f"{what} gives {dtype}, the run was trained with pixels: whether these are normalised as in training cannot"
            " be told",
            hint="let the dataset give the bytes (torch.uint8, 0 to 255)",
        )
    origin = f"datasets of {what}"
    return as_trained(samples, names, origin, known, what=what, by_order=by_order, stats=stats)


def _check_shape(shape: tuple[int, ...], known: Preprocessing, what: str) -> None:
    if shape != known.input_shape:
        have, want = ("x".join(map(str, given)) for given in (shape, known.input_shape))
        raise DataError(
            f"{what} has inputs of {have}, the run was trained with an input shape of {want}",
            hint="evaluate on data of the same shape",
        )
