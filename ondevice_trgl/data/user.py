"""Datasets that callers bring: named as `pkg.module:callable`, or handed over as they are."""

import hashlib
import importlib
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.data.images import ImageSet
from ondevice_trgl.data.splits import check_labels
from ondevice_trgl.errors import DataError

_PROBES = 16


class UserSet(ImageSet):
    """A map-style dataset of (tensor, int label), read sample by sample.

    `positions` (int64) picks samples; `labels` (int64) are the labels at those. Inputs are delivered as float32 and
    otherwise as they come: bytes become 0..1, nothing is normalised. `shape` may differ from the `given` one in
    height and width (bilinear) and repeat a single channel. Whole numbers are delivered as they are where int64 is
    asked for.
    """

    def __init__(
        self,
        dataset: Any,
        labels: Tensor,
        positions: Tensor,
        *,
        given: tuple[int, ...],
        shape: tuple[int, ...],
        num_classes: int,
        whole: tuple[int, int] | None = None,
        name: str = "dataset",
    ) -> None:
        super().__init__(labels, shape)
        self.whole = whole if shape == given else None
        self._dataset, self._positions, self._given = dataset, positions.tolist(), given
        self._num_classes, self._name = num_classes, name

    def _fill(self, indices: list[int], out: Tensor) -> Tensor:
        labels = []
        for row, index in enumerate(indices):
            position = self._positions[index]
            value, label = read_sample(self._dataset, position, self._given, name=self._name, dtype=out.dtype)
            if not 0 <= label < self._num_classes:
                raise DataError(
                    f"{self._name}: the label of sample {position} is {label}; expected 0..{self._num_classes - 1}"
                )
            if value.shape[1:] != self.shape[1:]:
                value = interpolate(value[None], size=self.shape[1:], mode="bilinear", align_corners=False)[0]
            out[row].copy_(value)
            labels.append(label)
        return torch.tensor(labels, dtype=torch.int64)


def read_sample(
    dataset: Any, position: int, shape: tuple[int, ...] | None, *, name: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, int]:
    """Sample `position` as (tensor, label): float32, bytes as 0..1; or whole numbers as they are, int64.

    Raises DataError where it is no such pair, or not of `shape`.
    """
    value, number = _sample(dataset, position, shape, name=name)
    if dtype == torch.int64:
        if not _is_whole(value):
            raise DataError(f"sample {position} of {name} is {value.dtype}; expected whole numbers, as in the others")
        return value.to(dtype), number
    scaled = value.to(torch.float32)
    return (scaled / 255 if value.dtype == torch.uint8 else scaled), number


def _is_whole(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def _sample(dataset: Any, position: int, shape: tuple[int, ...] | None, *, name: str) -> tuple[Tensor, int]:
    """Sample `position` as it comes."""
    where = f"sample {position} of {name}"
    sample = dataset[position]
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise DataError(f"{where} is {_described(sample)}; expected a pair of (input tensor, label)")
    value, label = sample
    if not isinstance(value, Tensor):
        raise DataError(
            f"the input of {where} is {_described(value)}; expected a torch.Tensor",
            hint="turn it into a tensor in the dataset, for example with a transform",
        )
    if shape is not None and tuple(value.shape) != shape:
        raise DataError(
            f"{where} has shape {_times(value.shape)}; expected {_times(shape)}, the shape of the first sample",
            hint="bring all inputs to one shape in the dataset",
        )
    try:
        number = operator.index(label)  # a whole number, also numpy's, and a tensor that holds one
    except TypeError:
        raise DataError(f"the label of {where} is {label!r}; expected a whole number") from None
    return value, number


def _described(value: Any) -> str:
    length = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"a {type(value).__name__}{length}"


def _times(shape: Any) -> str:
    return "x".join(map(str, shape)) or "a single number"


class Scanned(NamedTuple):
    """What one pass over a dataset shows."""

    labels: Tensor
    """int64 (N,)"""
    shape: tuple[int, ...]
    whole: tuple[int, int] | None
    """Lowest and highest number in the inputs, where all are whole."""


def scan(dataset: Any, *, name: str, shape: tuple[int, ...] | None = None) -> Scanned:
    """Labels of a map-style dataset, shape and kind of its inputs, in one pass over every sample.

    Raises DataError where it is not map-style, is empty, or a sample is malformed or not of `shape`.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{name} is {_described(dataset)}; expected a map-style dataset, with __len__ and __getitem__",
            hint="an iterable dataset has to be stored first",
        )
    if len(dataset) == 0:
        raise DataError(f"{name} is empty; expected at least one sample")
    labels = torch.empty(len(dataset), dtype=torch.int64)
    lowest, highest, whole = 0, 0, True
    for position in range(len(dataset)):
        value, label = _sample(dataset, position, shape, name=name)
        shape = tuple(value.shape)
        labels[position] = label
        whole = whole and _is_whole(value)
        if whole and value.numel():
            lowest, highest = min(lowest, int(value.min())), max(highest, int(value.max()))
    assert shape is not None
    return Scanned(labels, shape, (lowest, highest) if whole else None)


def image_set(dataset: Any, *, name: str = "dataset", num_classes: int | None = None) -> ImageSet:
    """`dataset` itself where it is an ImageSet, else all of it as a UserSet, after one pass over its samples.

    `num_classes` None: what the dataset states, else its highest label + 1. Raises DataError as `scan` does, and where
    a label is out of range.
    """
    if isinstance(dataset, ImageSet):
        return dataset
    labels, shape, whole = scan(dataset, name=name)
    names = stated_classes(dataset)
    if num_classes is None:
        num_classes = len(names) if names is not None else int(labels.max()) + 1
    check_labels(labels, num_classes, what=name)
    positions = torch.arange(len(labels))
    known = UserSet(
        dataset, labels, positions, given=shape, shape=shape, num_classes=num_classes, whole=whole, name=name
    )
    known.class_names = names
    return known


def stated_classes(dataset: Any) -> tuple[str, ...] | None:
    """Class names from the attribute `classes` or `num_classes` of the dataset or of the one it wraps."""
    while dataset is not None:
        classes, count = getattr(dataset, "classes", None), getattr(dataset, "num_classes", None)
        if isinstance(classes, tuple | list) and classes:
            return tuple(map(str, classes))
        if isinstance(count, int) and count > 0:
            return tuple(map(str, range(count)))
        dataset = getattr(dataset, "dataset", None)
    return None


def fingerprint(dataset: Any, digest: "hashlib.blake2b", *, name: str) -> None:
    """Add some inputs to `digest`, unless reading them twice gives two answers (random augmentation)."""
    step = max(1, len(dataset) // _PROBES)
    some = range(0, len(dataset), step)[:_PROBES]
    first, second = ([read_sample(dataset, position, None, name=name)[0] for position in some] for _ in range(2))
    if all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        for value in first:
            digest.update(bytes_of(value.contiguous()))


def call_named(spec: str) -> Any:
    """What the callable named by `pkg.module:callable` returns; the working directory is searched as well.

    Raises DataError where it cannot be imported, is not there, is not callable or fails.
    """
    module_name, _, attribute = spec.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise DataError(
            f"{spec!r}: importing {module_name} failed: {type(error).__name__}: {error}",
            hint="pkg.module must be importable from here",
        ) from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise DataError(
            f"{spec!r}: {module_name} has no callable {attribute!r}",
            hint="give a function without arguments that returns a dataset or (train, val[, test])",
        )
    try:
        return cast(Callable[[], Any], function)()
    except Exception as error:
        raise DataError(f"{spec!r} failed: {type(error).__name__}: {error}") from error
