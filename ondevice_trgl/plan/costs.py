"""What the pieces of a network take in memory, and so what any group of them does as one local module.

After each operator the bytes alive are affine in the batch, so that their peak is the largest of many straight lines:
weight gradients may make it at batch 4, and activations at batch 64.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ondevice_trgl.plan.breakdown import Breakdown
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.trgl.spill import CHUNK_ELEMENTS

_CHUNKS = 3 * 4 * CHUNK_ELEMENTS
"""Held while an update walks what is on disk."""
SMALL, LARGE = 2, 4
"""The two batches that lines are drawn through."""


@dataclass(frozen=True)
class Affine:
    """constant + slope · batch, in bytes."""

    constant: float
    slope: float

    def __call__(self, batch: int) -> float:
        return self.constant + self.slope * batch

    @classmethod
    def through(cls, at_small: float, at_large: float) -> "Affine":
        slope = (at_large - at_small) / (LARGE - SMALL)
        return cls(at_small - slope * SMALL, slope)


@dataclass(frozen=True)
class Envelope:
    """The largest of several straight lines, in bytes."""

    lines: tuple[Affine, ...]

    def __call__(self, batch: int) -> float:
        return self.line(batch)(batch)

    def line(self, batch: int) -> Affine:
        """The one that is largest at `batch`."""
        return max(self.lines, key=lambda line: line(batch))

    @classmethod
    def through(cls, at_small: list[int], at_large: list[int]) -> "Envelope":
        """Of two timelines of the same operators; of their peaks alone where the operators differ."""
        if len(at_small) != len(at_large):
            return cls((Affine.through(max(at_small), max(at_large)),))
        lines = {Affine.through(a, b) for a, b in zip(at_small, at_large, strict=True)}
        kept: list[Affine] = []
        for line in sorted(lines, key=lambda line: (-line.slope, -line.constant)):
            if not kept or line.constant > kept[-1].constant:  # else it lies below one of steeper slope
                kept.append(line)
        return cls(tuple(kept))


@dataclass(frozen=True)
class Cost:
    """Bytes of one segment or head, its input not counted."""

    parameters: int
    """Of those that are trained."""
    buffers: int
    """And parameters that are frozen."""
    largest: int
    """Of its largest parameter."""
    kernel: int
    """Of its largest parameter with three dimensions or more, a convolution's."""
    saved: Affine
    """Alive behind the forward pass for its own backward pass."""
    output: Affine
    """Its output, where `saved` does not hold it already."""
    keeps_input: bool
    """Whether its backward pass needs its input."""
    forward_peak: Envelope
    backward_peak: Envelope
    """From the start of the forward pass: saved tensors, gradients of parameters and input."""
    entry_peak: Envelope
    """The same where it comes first, and no gradient of its input is computed; of a frozen one, the forward pass."""


@dataclass(frozen=True)
class Costs:
    """Costs of all segments of a chain, and of the auxiliary head behind each."""

    segments: tuple[Cost, ...]
    heads: tuple[Cost | None, ...]
    """Behind segment i; None behind the last, and in the frozen front."""
    input_bytes: int
    """Of one sample."""
    output_bytes: tuple[int, ...]
    """Boundary activation behind segment i of one sample, as the network gives it."""
    optimizer: str
    momentum: float

    def to_dict(self) -> dict[str, Any]:
        """The costs as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Costs":
        """The inverse of `to_dict`."""
        return cls(
            **{
                **record,
                "segments": tuple(_cost(one) for one in record["segments"]),
                "heads": tuple(one and _cost(one) for one in record["heads"]),
                "output_bytes": tuple(record["output_bytes"]),
            }
        )

    def largest_kernel(self, start: int, stop: int) -> int:
        """Bytes of the largest kernel of a convolution in segments `start` to `stop` (exclusive)."""
        return max(segment.kernel for segment in self.segments[start:stop])

    def kept_bytes(self, start: int, stop: int) -> int:
        """What segments `start` to `stop` and their head hold between two steps: weights, buffers, optimizer state."""
        head = self.heads[stop - 1] if stop < len(self.segments) else None
        parts = [*self.segments[start:stop], *([head] if head else [])]
        trained = sum(part.parameters for part in parts)
        still = trained + sum(part.buffers for part in parts)
        return still + Optimizer.state_bytes(self.optimizer, trained, self.momentum)

    def module_bytes(
        self, start: int, stop: int, micro_batch: int, *, accumulate: bool, checkpointed: bool = False
    ) -> int:
        """Peak tensor bytes of training segments `start` to `stop` (exclusive) with their head as one module.

        Parameters, gradients, optimizer state, activations, the input buffer. With `accumulate`, gradients of the
        micro-batches before are alive throughout. With `checkpointed`, each segment keeps its input alone and is
        computed again in the backward pass.
        """
        return self.tensors(start, stop, micro_batch, accumulate=accumulate, checkpointed=checkpointed).total

    def tensors(
        self,
        start: int,
        stop: int,
        micro_batch: int,
        *,
        accumulate: bool,
        checkpointed: bool = False,
        spilled: bool = False,
    ) -> Breakdown:
        """`module_bytes` by purpose, at the moment of the peak.

        With `spilled`, gradients leave memory as they come, and optimizer state is never there but in chunks.
        """
        head = self.heads[stop - 1] if stop < len(self.segments) else None
        parts = [*self.segments[start:stop], *([head] if head else [])]
        parameters = sum(part.parameters for part in parts)
        ends = head.parameters if head else 0
        # the update holds every gradient, and nothing of its own
        peak = _Moment(gradients=_CHUNKS) if spilled else _Moment(gradients=parameters - ends, head=ends)
        alive, passed, rest = 0.0, 0.0, parameters
        frozen = self._leading_frozen(start, stop)
        if checkpointed and frozen < stop - start:
            frozen = 0  # their inputs are kept like those of the others
        for index, part in enumerate(parts):
            rest -= part.parameters
            recomputed = checkpointed and part is not head
            before = parameters if accumulate and not spilled else 0  # gradients of earlier micro-batches
            behind = 0 if spilled else parameters if accumulate else rest  # of the later parts, when backward gets here
            forward = (part.entry_peak if index < frozen else part.forward_peak)(micro_batch)
            inside, at_head = (0.0, forward) if part is head else (forward, 0.0)
            held = min(ends, before)
            peak = max(peak, _Moment(before - held, alive + passed + inside, held + at_head), key=_Moment.bytes)
            if index < frozen:  # no gradient goes there, and nothing is kept for one
                passed = float(micro_batch * self.output_bytes[start + index])
                continue
            if part.keeps_input or recomputed:
                alive += passed
            line = (part.backward_peak if index > frozen else part.entry_peak).line(micro_batch)
            backward = line(micro_batch)
            if spilled and not recomputed:  # of this part's gradients one is there at a time
                backward -= min(part.parameters - part.largest, max(0.0, line.constant))
            if recomputed:  # its output and the gradient of that are held from outside
                backward += micro_batch * self.output_bytes[start + index] + part.output(micro_batch)
            held = min(ends, behind)
            if part is head:
                now = _Moment(behind - held, alive, held + backward)
            else:  # what does not grow with the batch are gradients of parameters
                own = min(float(part.largest if spilled else part.parameters), max(0.0, line.constant))
                now = _Moment(behind - held + own, alive + backward - own, held)
            peak = max(peak, now, key=_Moment.bytes)
            if recomputed:
                passed = float(micro_batch * self.output_bytes[start + index])
            else:
                alive += part.saved(micro_batch)
                passed = part.output(micro_batch)
        weights = sum(part.parameters + part.buffers for part in parts)
        state = 0 if spilled else Optimizer.state_bytes(self.optimizer, parameters, self.momentum)
        source = micro_batch * (self.output_bytes[start - 1] if start else self.input_bytes)
        of_head = Optimizer.state_bytes(self.optimizer, ends, self.momentum) if head and not spilled else 0
        at_head = head.parameters + head.buffers if head else 0
        result = Breakdown(
            weights=weights - at_head,
            gradients=int(peak.gradients),
            optimizer=state - of_head,
            activations=source,
            head=at_head + of_head + int(peak.head),
        )
        total = weights + state + source + int(peak.bytes())
        return dataclasses.replace(result, activations=source + total - result.total)

    def _leading_frozen(self, start: int, stop: int) -> int:
        """How many segments from `start` on, before `stop`, have nothing to train."""
        trained = (index for index in range(start, stop) if self.segments[index].parameters)
        return next(trained, stop) - start


@dataclass(frozen=True)
class _Moment:
    """Bytes alive beside what stays: gradients and activations of the module, and both of its head."""

    gradients: float = 0.0
    activations: float = 0.0
    head: float = 0.0

    def bytes(self) -> float:
        return self.gradients + self.activations + self.head


def _cost(record: dict[str, Any]) -> Cost:
    lines = {name: Affine(**record[name]) for name in ("saved", "output")}
    peaks = {
        name: Envelope(tuple(Affine(**line) for line in record[name]["lines"]))
        for name in ("forward_peak", "backward_peak", "entry_peak")
    }
    return Cost(**{**record, **lines, **peaks})
