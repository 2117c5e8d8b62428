"""What a sample is learned to be, as a dataset of the user's gives it: the number of a class, or numbers."""

import contextlib
import operator
from array import array
from typing import Any

import torch
from torch import Tensor

from ondevice_trgl.device.limit import lacks_memory
from ondevice_trgl.errors import DataError
from ondevice_trgl.tasks import AUTO, CLASSES, MULTI_LABEL, REGRESSION

Label = int | Tensor
"""The number of a class, or targets, float32 (T,)."""
_MOST_SHOWN = 80


class Targets:
    """Reads labels as `kind` has them: classes, regression, multi-label. With auto the first one read tells.

    Then `kind` is classes, or still auto: the first was floats, and what they are shows when all are known; see
    `settle`. `width`: numbers a sample, as the first has them; None before, and of classes.
    """

    def __init__(self, kind: str = AUTO, width: int | None = None) -> None:
        self.kind, self.width = kind, width
        self._asked = kind

    def read(self, label: Any, where: str) -> Label:
        """What `label` stands for. Raises DataError."""
        if self.kind == AUTO and self.width is None and not _looks_like_floats(label):
            self.kind = CLASSES
        return _class(label, where) if self.kind == CLASSES else self._numbers(label, where)

    def _numbers(self, label: Any, where: str) -> Tensor:
        values, what = _tensor(label), "labels" if self.kind == MULTI_LABEL else "targets"
        if values is None or values.ndim > 1 or values.numel() == 0 or values.is_complex():
            raise DataError(
                f"the target of {where} is {_shown(label)}; expected a number, or a vector of them",
                hint="give a float, or a tensor of shape (T,) with as many in every sample",
            )
        if self.kind != MULTI_LABEL and not values.is_floating_point():
            raise DataError(
                f"the target of {where} is {_shown(label)}, whole; expected floats, for task = 'regression'",
                hint="give float(label), or label.float(), where it is an amount; classes are task = 'classes'",
            )
        values = values.reshape(-1).to(torch.float32)
        if self.width is None:
            self.width = len(values)
        if len(values) != self.width:
            raise DataError(
                f"{where} has {len(values)} {what}; expected {self.width}, as in the first",
                hint=f"give as many {what} in every sample",
            )
        if self.kind == MULTI_LABEL:
            wrong = ((values != 0) & (values != 1)).nonzero()
            if len(wrong):
                raise DataError(
                    f"label {int(wrong[0])} of {where} is {float(values[wrong[0]]):g}; expected 0 or 1",
                    hint="multi-label has a 1 for every label that is there; a class number is for task = 'classes'",
                )
        elif not bool(torch.isfinite(values).all()):
            at = int((~torch.isfinite(values)).nonzero()[0])
            raise DataError(
                f"target {at} of {where} is {float(values[at])}; expected a finite number",
                hint="leave the sample out, or fill what is missing",
            )
        return values

    def settle(self, labels: Tensor, name: str) -> None:
        """Tell what floats are, once all are known: float32 (N, T). Raises DataError where they may be two things."""
        if self.kind != AUTO:
            return
        asks = "state which is meant: task = 'regression', or "
        if bool(((labels == 0) | (labels == 1)).all()) and labels.shape[1] > 1:
            one_hot = bool((labels.sum(1) == 1).all())
            classes = "; one-hot classes are given as label.argmax()" if one_hot else ""
            raise DataError(
                f"the targets of {name} are vectors of 0 and 1: labels that are there or not, or numbers",
                hint=f"{asks}task = 'multi-label' (--task){classes}",
            )
        if labels.shape[1] == 1 and bool((labels == labels.round()).all()):
            raise DataError(
                f"the labels of {name} are floats, and all are whole: class numbers, or amounts",
                hint=f"{asks}give int(label) for classes",
            )
        self.kind = REGRESSION

    def gathered(self) -> "Gathered":
        """A place for all labels, read one by one."""
        return Gathered(self)


class Gathered:
    """Labels in the order in which they come. Memory: 8 bytes each, of targets 4 a number."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._classes, self._numbers = array("q"), array("f")

    def add(self, label: Label) -> None:
        if isinstance(label, int):
            self._classes.append(label)
        else:
            self._numbers.extend(label.tolist())

    def tensor(self) -> Tensor:
        """int64 (N,), or float32 (N, T)."""
        if self._targets.width is None:
            return torch.tensor(self._classes, dtype=torch.int64)
        return torch.tensor(self._numbers, dtype=torch.float32).view(-1, self._targets.width)


def together(labels: list[Label]) -> Tensor:
    """Labels of one kind as one tensor, int64 (n,) or float32 (n, T)."""
    tensors = [label for label in labels if isinstance(label, Tensor)]
    return torch.stack(tensors) if tensors else torch.tensor(labels, dtype=torch.int64)


def _looks_like_floats(label: Any) -> bool:
    values = _tensor(label)
    return values is not None and values.is_floating_point() and values.numel() > 0


def _tensor(label: Any) -> Tensor | None:
    """A number, or several, of whatever library; None of what is none."""
    if isinstance(label, str | bytes) or label is None:
        return None
    try:
        values = torch.as_tensor(label).detach()
        usable = values.device.type != "meta" and values.layout == torch.strided and not values.is_quantized
        return values if usable else None
    except Exception as error:  # whatever the user's object does
        if lacks_memory(error):
            raise
        return None


def _class(label: Any, where: str) -> int:
    """The number of a class, also one of numpy's or a tensor that holds one. Raises DataError."""
    value = label
    try:
        if callable(getattr(label, "item", None)):
            value = label.item()
        number = operator.index(value)
    except Exception as error:  # TypeError, or what tensors with more elements or without values raise
        if lacks_memory(error):
            raise
        raise DataError(
            f"the label of {where} is {_shown(label)}; expected a whole number", hint=_class_hint(label, value)
        ) from None
    if not -(1 << 63) <= number < 1 << 63:
        raise DataError(f"the label of {where} is {number}; expected the number of a class", hint="number them from 0")
    return number


def _class_hint(label: Any, value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return "give int(label)"
    with contextlib.suppress(Exception):
        values = torch.as_tensor(label).flatten()
        if len(values) > 1:
            if int((values == 1).sum()) == 1 and int((values == 0).sum()) == len(values) - 1:
                return "it looks one-hot: give label.argmax()"
            return "give one class a sample; several labels at once are task = 'multi-label', numbers 'regression'"
        if values.is_floating_point():
            return "a label is the number of its class, from 0; numbers are learned by task = 'regression'"
    return "a label is the number of its class, from 0"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() > 1:
        return f"a tensor of {value.numel()} elements"
    said = " ".join(repr(value).split())
    return said if len(said) <= _MOST_SHOWN else f"{said[:_MOST_SHOWN]}..."
