"""Whether deeper modules still help, as far as the validation set can tell."""

import math
from collections.abc import Sequence

from ondevice_trgl.tasks import ACCURACY, F1, R2

_MODULES = 2
"""In a row that have to gain nothing."""


def has_stalled(accuracies: Sequence[float], samples: int, metric: str = ACCURACY) -> bool:
    """Whether the last two heads are not above the best of those before by more than that one's standard error.

    `accuracies` are the `metric` of the modules' heads on the same `samples` of the validation set, in order. What lies
    within the standard error may be chance. That of a share p of n samples is sqrt(p (1 - p) / n), taken for F1 too; of
    R2 it is 2 sqrt(R2 / n) (1 - R2) (Olkin and Finn); of a metric of the user's it is not known, and taken as none.
    """
    before = accuracies[:-_MODULES]
    if not before:
        return False
    best = max(before)
    return max(accuracies[-_MODULES:]) <= best + _standard_error(best, samples, metric)


def _standard_error(value: float, samples: int, metric: str) -> float:
    if metric == R2:
        return 2.0 * math.sqrt(max(0.0, value) / samples) * (1.0 - value)
    return math.sqrt(value * (1.0 - value) / samples) if metric in (ACCURACY, F1) else 0.0
