"""By what heads are compared: a figure of a whole split, larger is better, gathered batch by batch."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ondevice_trgl.errors import UsageError, first_line
from ondevice_trgl.imported import function_named, name_of

Metric = Callable[[Tensor, Tensor], Any]
"""(predictions (N, ...), labels or targets (N, ...)), of a whole split -> a number."""
_ROWS = 65536
_TRIED = 1024


class Figure(Protocol):
    """Gathers what a metric needs of outputs and of what they should be, both on the CPU."""

    def add(self, outputs: Tensor, targets: Tensor) -> None: ...
    def value(self) -> float: ...


class Accuracy:
    """The share of samples whose largest output, of (n, classes), is that of their class, int64 (n,)."""

    def __init__(self) -> None:
        self._right = self._rows = 0

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        self._right += int((outputs.argmax(1) == targets).sum())
        self._rows += len(targets)

    def value(self) -> float:
        return self._right / self._rows


class R2:
    """1 - squared error / variance of each target of (n, T), the mean over them; the root of the squared error beside.

    `targets` are those of the whole split. Of a target that never varies it is 1 where all are met, else 0.
    """

    def __init__(self, targets: Tensor) -> None:
        mean = sum((part.double().sum(0) for part in targets.split(_ROWS)), torch.zeros(())) / len(targets)
        self._spread = sum(((part.double() - mean).square_().sum(0) for part in targets.split(_ROWS)), torch.zeros(()))
        self._error, self._rows = torch.zeros(targets.shape[1:], dtype=torch.float64), len(targets)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        self._error += (outputs.double() - targets).square_().sum(0)

    def value(self) -> float:
        varied = self._spread > 0
        share = torch.where(varied, 1.0 - self._error / torch.where(varied, self._spread, 1.0), self._error == 0)
        return float(share.mean())

    def rmse(self) -> float:
        """The root of the mean, over samples and targets, of the squared error."""
        return math.sqrt(float(self._error.sum()) / (self._rows * self._error.numel()))


class F1:
    """2 hits / (2 hits + misses + false alarms) of each label of (n, T), the mean over labels (macro).

    A label is seen where the output is above `threshold`. One that is neither there nor seen in any sample is left out.
    """

    def __init__(self, labels: int, threshold: float) -> None:
        self._threshold = threshold
        self._hits, self._wrong = torch.zeros(labels, dtype=torch.int64), torch.zeros(labels, dtype=torch.int64)

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        seen, there = outputs > self._threshold, targets > 0.5
        self._hits += (seen & there).sum(0)
        self._wrong += (seen != there).sum(0)

    def value(self) -> float:
        counted = self._hits + self._wrong > 0
        hits, wrong = 2.0 * self._hits[counted].double(), self._wrong[counted]
        return float((hits / (hits + wrong)).mean()) if len(hits) else 1.0


class OwnMetric:
    """A metric of the user's, whose result is looked at every time. One that is named is imported when it is used."""

    def __init__(self, given: str | Metric) -> None:
        self.name, self._given = name_of(given), given

    def __call__(self, predictions: Tensor, targets: Tensor) -> float:
        """Raises UsageError where it cannot be imported, fails, or gives no number."""
        if isinstance(self._given, str):
            self._given = function_named(self._given, "metric", "predictions, targets")
        expected = f"it is given predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)} of a split"
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                found = self._given(predictions, targets)
                value = float(found)
        except Exception as error:  # whatever the user's code raises
            raise UsageError(
                f"metric {self.name} raised {type(error).__name__}: {first_line(error)}", hint=expected
            ) from error
        if not math.isfinite(value):
            raise UsageError(
                f"metric {self.name} returned {value}; expected a number, larger is better",
                hint=f"{expected}, which may be all alike: give the worst value there",
            )
        return value

    def try_out(self, targets: Tensor, outputs: int) -> None:
        """On up to 1024 of the training samples, with predictions that are all alike, as a poor head gives them."""
        some = targets[:: max(1, -(-len(targets) // _TRIED))]
        self(torch.full((len(some), outputs), 1.0 / outputs), some)
