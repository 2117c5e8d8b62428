"""What a module will take: its tensors, known exactly, and what kernels, their code and the allocator take beside them.

The second is measured where a rehearsal was made. Elsewhere it is a share of what moves: activations, the auxiliary
head, kernels of convolutions, which oneDNN holds once more in an order of its own. Weights, gradients and optimizer
state lie still in blocks of their own size; a linear layer of 411 MB was seen to take nothing beside them.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ondevice_trgl.device.limit import CODE_BYTES
from ondevice_trgl.plan.breakdown import Breakdown
from ondevice_trgl.plan.costs import Costs
from ondevice_trgl.plan.plan import Level

# Measured on two cores, torch 2.13 CPU.
MOST_SHARE = 0.30
"""Of what moves, allowed for beside it where that must be enough."""
_KERNELS = 2 / MOST_SHARE
"""At that share, room for the largest kernel of a convolution and for its gradient once more."""


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal showed of one module on one level."""

    above_bytes: int
    """Peak above the floor."""
    is_direct: bool = True
    """Of that level itself; else derived from a smaller micro-batch."""
    step_seconds: float | None = None
    """Of one micro-batch in training, its share of the update included; None where it was not timed."""
    sweep_seconds: float | None = None
    """Of one micro-batch forwards, its output cached."""


Measured = Mapping[tuple[int, int, Level], Rehearsed]
"""By (start, stop, level)."""


class Predictor:
    """Peaks of modules at `batch` samples a step, in bytes above the floor, as `rehearsed` allows to tell.

    All of them are multiplied by `scale`, see `falsify`.
    """

    def __init__(self, costs: Costs, batch: int, rehearsed: Measured, share: float, scale: float = 1.0) -> None:
        self._costs, self._batch, self._rehearsed, self._share = costs, batch, rehearsed, share
        self._scale = scale
        self._tensors_of = functools.cache(self._tensors)
        self._segments, self._heads = _numbered(costs.segments), _numbered(costs.heads)
        self._firsts: dict[tuple[object, ...], tuple[int, int]] = {}
        self._surprises = self._learned()

    def tensors(self, start: int, stop: int, level: Level) -> Breakdown:
        """What the tensors of segments `start` to `stop` take on `level`; told once of spans that are alike."""
        costs = self._costs
        enters = costs.output_bytes[start - 1] if start else costs.input_bytes
        head = self._heads[stop - 1] if stop < len(self._segments) else None
        key = (self._segments[start:stop], head, enters, costs.output_bytes[start:stop])
        return self._tensors_of(*self._firsts.setdefault(key, (start, stop)), level)

    def _tensors(self, start: int, stop: int, level: Level) -> Breakdown:
        return self._costs.tensors(
            start,
            stop,
            level.micro,
            accumulate=level.micro < self._batch,
            checkpointed=level.checkpointed,
            spilled=level.spilled,
        )

    def _moving(self, start: int, stop: int, level: Level) -> float:
        """Everything but weights, gradients and optimizer state, by estimate."""
        tensors = self.tensors(start, stop, level)
        moving = tensors.activations + tensors.head
        return CODE_BYTES + moving + self._share * (moving + _KERNELS * self._costs.largest_kernel(start, stop))

    def _learned(self) -> list[tuple[float, float]]:
        """Of what was rehearsed: the estimate of what moves, and how many times that it took, at least once."""
        found = []
        for (start, stop, level), known in self._rehearsed.items():
            moving = self._moving(start, stop, level)
            found.append((moving, max(1.0, (known.above_bytes - self.tensors(start, stop, level).still) / moving)))
        return found

    def _surprise(self, moving: float) -> float:
        """What was not rehearsed is taken to exceed its estimate as that did which is nearest to it in size."""
        nearest = min(self._surprises, key=lambda known: abs(math.log(known[0] / moving)), default=(moving, 1.0))
        return nearest[1]

    def above(self, start: int, stop: int, level: Level) -> int:
        """Peak of segments `start` to `stop` on `level`, above the floor."""
        known = self.rehearsed(start, stop, level)
        if known is not None:
            return known.above_bytes
        moving = self._moving(start, stop, level)
        return int(self._scale * (self.tensors(start, stop, level).still + int(self._surprise(moving) * moving)))

    def rehearsed(self, start: int, stop: int, level: Level) -> Rehearsed | None:
        """What a rehearsal of these segments on `level` showed."""
        return self._rehearsed.get((start, stop, level))

    def allowing(self, share: float) -> "Predictor":
        """One that allows for at least `share`, and takes every module for the worst that was rehearsed."""
        careful = Predictor(self._costs, self._batch, self._rehearsed, max(self._share, share), self._scale)
        worst = max((times for _, times in careful._surprises), default=1.0)
        careful._surprises = [(1.0, worst)]
        return careful


def _numbered(values: Sequence[object]) -> tuple[int, ...]:
    """For each value the index of the first that equals it."""
    return tuple(values.index(value) for value in values)


def from_smaller(costs: Costs, span: tuple[int, int], above: int, small: Breakdown, full: Breakdown, times: int) -> int:
    """Peak above the floor of a module from `above`, its peak at a micro-batch `times` smaller.

    `small` and `full` are the tensors of both. What was taken beside them grows at most in proportion to the batch; the
    code of kernels and their copies of weights do not grow.
    """
    beside = above - small.total
    constant = min(beside, CODE_BYTES + 2 * costs.largest_kernel(*span))
    return full.total + constant + times * (beside - constant)
