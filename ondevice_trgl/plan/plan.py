"""Plan: what will be trained how, and what each module can fall back on when memory runs short."""

import dataclasses
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.allocator import HOLDS, TIGHT
from ondevice_trgl.plan.breakdown import Breakdown
from ondevice_trgl.plan.pareto import Choice
from ondevice_trgl.typed import record_of
from ondevice_trgl.units import format_size


@dataclass(frozen=True)
class Level:
    """A way to train any module."""

    micro: int
    """Micro-batch size."""
    checkpointed: bool
    """Activations inside the module are computed again in the backward pass, from the inputs of its segments."""
    spilled: bool = False
    """Gradients and optimizer state wait on disk, and come into memory a few megabytes at a time."""
    hold: str = TIGHT
    """How tight the C allocator is held, see `device.allocator.HOLDS`."""


@dataclass(frozen=True)
class Rung:
    """One way to train a module; the way below it on the ladder takes less memory."""

    micro_batch_size: int
    checkpointed: bool
    """Activations inside the module are computed again in the backward pass, from the inputs of its segments."""
    peak_bytes: int
    """Predicted, whole process."""
    measured: bool = False
    """Predicted from a step that was run, not from the estimate alone."""
    spilled: bool = False
    """Gradients and optimizer state wait on disk."""
    hold: str = TIGHT
    """How tight the C allocator is held, see `device.allocator.HOLDS`: faster, and larger, where it is less so."""

    @property
    def level(self) -> Level:
        """The way alone, without what it takes."""
        return Level(self.micro_batch_size, self.checkpointed, self.spilled, self.hold)

    def __str__(self) -> str:
        ways = ["checkpointed"] * self.checkpointed + ["gradients and optimizer state on disk"] * self.spilled
        ways += [f"allocator held {self.hold}"] * (self.hold != TIGHT)
        return ", ".join([f"micro-batch {self.micro_batch_size}", *ways])


@dataclass(frozen=True)
class Plan:
    """What will be trained how. `bounds` are segment indices, as in Partition."""

    bounds: tuple[int, ...]
    batch_size: int
    ladders: tuple[tuple[Rung, ...], ...]
    """Of each module: the ways to train it in the order of preference, each taking less memory than the one before."""
    budget_bytes: int
    floor_bytes: int
    cache_tier: str
    cache_dtype: str
    cache_bytes: int
    """Most bytes of boundary activations at one time."""
    end_to_end_bytes: int
    """Predicted peak of plain end-to-end training at the full batch."""
    reasons: tuple[str, ...]
    classifier: bool = False
    """The last module is the network's own classifier, behind modules that each have an auxiliary head."""
    passed: int = 0
    """Modules in front that are frozen, and passed through without auxiliary heads."""
    set_up_bytes: int = 0
    """Taken at most by the processes that set the run up, before it trains."""
    breakdowns: tuple[tuple[Breakdown, ...], ...] = ()
    """Of each rung of `ladders`, in the same order; () in plans from before there were any."""
    write_bytes: int | None = None
    """What an undisturbed run writes to disk, see `plan.writes`; None in plans from before that was known."""
    pareto: tuple[Choice, ...] = ()
    """The choices that no other beats in predicted bytes, seconds an epoch and disk bytes."""

    @property
    def num_trained(self) -> int:
        """Modules without those of the frozen front, and without the classifier."""
        return self.num_modules - self.passed

    def epochs(self, config: TrainConfig, index: int) -> int:
        """That module `index` trains in each lap; the network's own classifier, where it is apart, has others."""
        if self.classifier and index == self.num_parts - 1:
            return config.own_epochs
        return config.epochs_of(max(0, index - self.passed), self.num_trained)

    def summary(self) -> str:
        """A few lines for people: what was chosen, why, and the predicted peak of each module."""
        peaks = ", ".join(format_size(peak) for peak in self.predicted_peak_bytes)
        lines = [
            f"{self.num_modules} modules{' and the classifier' if self.classifier else ''}"
            f"{f' ({self.passed} frozen)' if self.passed else ''},"
            f" batch {self.batch_size} = {self.micro_batch_size} x {self.grad_accum_steps}",
            f"predicted peak {format_size(self.peak_bytes)} of {format_size(self.budget_bytes)} (by module: {peaks})",
            f"end-to-end would need {format_size(self.end_to_end_bytes)}",
            *([] if self.write_bytes is None else [f"the run writes {format_size(self.write_bytes)} to disk"]),
            *self.reasons,
        ]
        return "\n".join(lines)

    @property
    def num_modules(self) -> int:
        """Without the classifier, where that is one of its own."""
        return self.num_parts - self.classifier

    @property
    def num_parts(self) -> int:
        """Whatever is trained one after another: the modules and, where it is one of its own, the classifier."""
        return len(self.bounds) - 1

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """How each module will be trained: the first that fits."""
        return tuple(rung_within(ladder, self.budget_bytes) for ladder in self.ladders)

    @property
    def micro_batch_size(self) -> int:
        """The smallest of the modules' that train; in the frozen front it makes no difference."""
        return min(rung.micro_batch_size for rung in self.rungs[self.passed :])

    @property
    def checkpointed(self) -> bool:
        """Whether any module computes activations again."""
        return any(rung.checkpointed for rung in self.rungs)

    @property
    def spilled(self) -> bool:
        """Whether any module has gradients and optimizer state on disk."""
        return any(rung.spilled for rung in self.rungs)

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches a step, where `micro_batch_size` holds."""
        return self.batch_size // self.micro_batch_size

    @property
    def predicted_peak_bytes(self) -> tuple[int, ...]:
        """Whole process, of each module."""
        return tuple(rung.peak_bytes for rung in self.rungs)

    @property
    def predicted_breakdowns(self) -> tuple[Breakdown, ...]:
        """What the bytes of `predicted_peak_bytes` are for, of each module; () where that was not kept."""
        chosen = zip(self.ladders, self.breakdowns, self.rungs, strict=True) if self.breakdowns else ()
        return tuple(breakdowns[ladder.index(rung)] for ladder, breakdowns, rung in chosen)

    @property
    def peak_bytes(self) -> int:
        """Predicted for the whole run, setting it up included."""
        return max(self.set_up_bytes, *self.predicted_peak_bytes)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Plan":
        """The inverse of `to_dict`. Raises ValueError for what is none."""
        plan = record_of(cls, record)
        if fault := plan._fault():
            raise ValueError(fault)
        return plan

    def _fault(self) -> str:
        """What makes it a plan of nothing; "" where nothing does."""
        if len(self.bounds) < 2 or self.bounds[0] != 0 or any(a >= b for a, b in pairwise(self.bounds)):
            return f"bounds are {reprlib.repr(self.bounds)}, expected 0 and what follows to ascend"
        sizes = list(map(len, self.ladders))
        if len(sizes) != self.num_parts or not all(sizes):
            return f"there are {len(sizes)} ladders, expected {self.num_parts} with a rung or more"
        if self.breakdowns and list(map(len, self.breakdowns)) != sizes:
            return "breakdowns are not those of the ladders"
        micro = [rung.micro_batch_size for ladder in self.ladders for rung in ladder]
        if not 1 <= min(micro) <= max(micro) <= self.batch_size or any(self.batch_size % one for one in micro):
            return f"micro-batches are {min(micro)} to {max(micro)}, expected parts of a batch of {self.batch_size}"
        if not 0 <= self.passed < self.num_parts:
            return f"passed is {self.passed} of {self.num_parts} modules"
        if not all(rung.hold in HOLDS for ladder in self.ladders for rung in ladder):
            return f"the allocator is held in another way than {', '.join(HOLDS)}"
        bytes_ = (self.budget_bytes, self.floor_bytes, self.cache_bytes, self.set_up_bytes, self.write_bytes or 0)
        return "bytes are below zero" if min(bytes_) < 0 else ""


def rung_within(ladder: Sequence[Rung], budget_bytes: int) -> Rung:
    """The first rung that is predicted to fit; the last where none is."""
    return next((rung for rung in ladder if rung.peak_bytes <= budget_bytes), ladder[-1])
