"""Whether deeper modules still help, as far as the validation set can tell."""

import math
from collections.abc import Sequence

_MODULES = 2
"""In a row that have to gain nothing."""


def has_stalled(accuracies: Sequence[float], samples: int) -> bool:
    """Whether the last two heads are not above the best of those before by more than that one's standard error.

    `accuracies` are those of the modules' heads on the same `samples` of the validation set, in order. A share p of n
    samples has the standard error sqrt(p (1 - p) / n): what lies within it may be chance.
    """
    before = accuracies[:-_MODULES]
    if not before:
        return False
    best = max(before)
    return max(accuracies[-_MODULES:]) <= best + math.sqrt(best * (1.0 - best) / samples)
