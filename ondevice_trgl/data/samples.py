"""One sample after another of a dataset that callers bring: what is wrong with it is told by sample and dataset."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ondevice_trgl.data.targets import Label, Targets
from ondevice_trgl.device.limit import lacks_memory
from ondevice_trgl.errors import DataError, TrglError, first_line
from ondevice_trgl.tasks import CLASSES

_UNORDERED = (torch.uint16, torch.uint32, torch.uint64)
"""Whole numbers that torch finds no lowest and highest of."""


class Samples:
    """A map-style dataset of (tensor, label), called `name` in messages; `count` samples, as it says itself.

    Inputs are of `shape`, which is that of the first one read where it is not given. `targets` reads the labels.
    Whatever reading raises becomes a DataError, but for a want of memory. Raises DataError where `dataset` is not
    map-style, or is empty.
    """

    def __init__(
        self, dataset: Any, *, name: str, shape: tuple[int, ...] | None = None, targets: Targets | None = None
    ) -> None:
        self.dataset, self.name, self.shape = dataset, name, shape
        self.targets = targets or Targets(CLASSES)
        self.count = _length(dataset, name)
        if self.count == 0:
            raise DataError(f"{name} is empty; expected at least one sample")

    def check_count(self) -> None:
        """Raises DataError where the dataset says another number of samples than at first."""
        if (now := _length(self.dataset, self.name)) != self.count:
            raise DataError(
                f"{self.name} said it has {self.count} samples, and now says {now}",
                hint="a dataset has to keep its samples while it is trained on: __len__ must not change",
            )

    def read(self, position: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Label]:
        """Sample `position` as (tensor, label): float32, bytes as 0..1; or whole numbers as they are, int64."""
        value, number = self.given(position)
        if dtype == torch.int64:
            if not is_whole(value):
                raise DataError(
                    f"sample {position} of {self.name} is {value.dtype}; expected whole numbers, as in the others"
                )
            return value.to(dtype), number
        scaled = value.to(torch.float32)
        return (scaled / 255 if value.dtype == torch.uint8 else scaled), number

    def given(self, position: int) -> tuple[Tensor, Label]:
        """Sample `position` as it comes."""
        where = f"sample {position} of {self.name}"
        sample = self._fetched(position, where)
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise DataError(
                f"{where} is {described(sample)}; expected a pair of (input tensor, label)", hint=_pair_hint(sample)
            )
        value = _input(sample[0], where)
        if self.shape is None:
            self.shape = tuple(value.shape)
        elif tuple(value.shape) != self.shape:
            raise DataError(
                f"{where} has shape {_times(value.shape)}; expected {_times(self.shape)}, the shape of the first",
                hint="bring all inputs to one shape in the dataset",
            )
        return value, self.targets.read(sample[1], where)

    def _fetched(self, position: int, where: str) -> Any:
        try:
            return self.dataset[position]
        except Exception as error:  # whatever the user's code raises
            if _passes(error):
                raise
            if isinstance(error, IndexError):
                raise DataError(
                    f"{self.name} says it has {self.count} samples, sample {position} raises {_said(error)}",
                    hint="__len__ must return how many samples __getitem__ gives",
                ) from error
            raise DataError(
                f"{where} cannot be read: {_said(error)}", hint=f"dataset[{position}] raises the same"
            ) from error


def _passes(error: Exception) -> bool:
    """Whether `error` is to go on as it is: one of ours, or a want of memory, which training answers by taking less."""
    return isinstance(error, TrglError) or lacks_memory(error)


def _said(error: Exception) -> str:
    kind, said = type(error).__name__, first_line(error)
    return kind if said == kind else f"{kind}: {said}"


def _length(dataset: Any, name: str) -> int:
    """What `dataset` says; 0 and more. Raises DataError where it is not map-style, or says no such number."""
    kind = type(dataset)
    lacking = [method for method in ("__len__", "__getitem__") if getattr(kind, method, None) is None]
    if lacking or isinstance(dataset, IterableDataset | DataLoader):
        hint = "an iterable dataset has to be stored first: list(dataset), where that fits into memory"
        if isinstance(dataset, DataLoader):
            hint = "give the dataset that it loads (loader.dataset): batches are made here"
        elif lacking == ["__len__"] and not isinstance(dataset, IterableDataset):
            hint = f"add __len__ to {kind.__name__}: it returns the number of samples"
        raise DataError(
            f"{name} is {described(dataset)}; expected a map-style dataset, with __len__ and __getitem__", hint=hint
        )
    try:
        return len(dataset)
    except Exception as error:  # whatever the user's code raises, or no number of at least 0
        if _passes(error):
            raise
        found = f"raises {_said(error)}"
        with contextlib.suppress(Exception):
            found = f"returns {kind.__len__(dataset)!r}"
        raise DataError(
            f"__len__ of {name} {found}; expected a whole number of at least 1",
            hint="it must return the number of samples",
        ) from error


def _pair_hint(sample: Any) -> str:
    if isinstance(sample, Mapping) and len(sample) >= 2:
        first, second = [f"sample[{key!r}]" for key in sample][:2]
        return f"return two of its values, for example ({first}, {second}); it has {', '.join(map(repr, sample))}"
    if isinstance(sample, tuple | list) and len(sample) > 2:
        return f"return the first two alone, or which of the {len(sample)} are the input and the label"
    if isinstance(sample, Tensor):
        return "make pairs of the inputs and the labels: torch.utils.data.TensorDataset(inputs, labels)"
    if isinstance(sample, Dataset):
        return "several datasets are given as a tuple: (train, val[, test])"
    return ""


def _input(value: Any, where: str) -> Tensor:
    """`value`, which is a dense tensor with something in it. Raises DataError."""
    if not isinstance(value, Tensor):
        module = type(value).__module__.split(".")[0]
        hint = {
            "PIL": "add ToTensor() to the transforms of the dataset",
            "numpy": "torch.from_numpy(value) makes one of it",
        }.get(module, "turn it into a tensor in the dataset, for example with a transform")
        raise DataError(f"the input of {where} is {described(value)}; expected a torch.Tensor", hint=hint)
    fault, way_out = "", ""
    if value.is_nested:
        fault, way_out = "is nested", "bring all inputs to one shape in the dataset"
    elif value.is_quantized:
        fault, way_out = f"is quantized ({value.dtype})", "give value.dequantize()"
    elif value.layout != torch.strided:
        fault, way_out = f"is sparse ({value.layout})", "give value.to_dense()"
    elif value.is_complex():
        fault = f"has complex numbers ({value.dtype})"
        way_out = "give value.abs(), or torch.view_as_real(value), which adds an axis of two"
    elif value.device.type == "meta":
        fault, way_out = "has a shape and no values (device meta)", "make it on the CPU"
    elif value.requires_grad:
        fault, way_out = "requires gradients, which holds what it came from in memory", "give value.detach()"
    elif value.numel() == 0:
        fault, way_out = f"has no elements (shape {_times(value.shape)})", "leave it out, or mend how it is made"
    if fault:
        raise DataError(f"the input of {where} {fault}; expected a dense tensor of plain numbers", hint=way_out)
    return value


def is_whole(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)


def extremes(value: Tensor) -> tuple[int, int]:
    """Lowest and highest of whole numbers."""
    ordered = value.to(torch.int64) if value.dtype in _UNORDERED else value
    return int(ordered.min()), int(ordered.max())


def described(value: Any) -> str:
    """What `value` is, in a message: "a list of 3"."""
    length = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"{'an' if type(value).__name__[:1] in 'AEIO' else 'a'} {type(value).__name__}{length}"


def _times(shape: Any) -> str:
    return "x".join(map(str, shape)) or "a single number"
