"""Costs + budget -> Plan: the fewest modules that fit at the full batch, then smaller micro-batches."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ondevice_trgl.cache.base import row_bytes
from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import BudgetInfeasibleError, UsageError
from ondevice_trgl.model.partition import balance, check_count, named_bounds
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.plan.estimate import Costs
from ondevice_trgl.units import format_size

# Measured on two cores, torch 2.13 CPU.
CODE_BYTES = 45_000_000
"""Code pages, thread stacks and the like that training brings into memory, whatever it trains."""
SLACK = 0.03
"""Share of the tensors that the allocator holds beside them."""
UNMEASURED_SCRATCH = 0.30
"""Share of the tensors that kernels take beside them at most, for want of a probe."""


@dataclass(frozen=True)
class Plan:
    """What will be trained how. `bounds` are segment indices, as in Partition."""

    bounds: tuple[int, ...]
    batch_size: int
    micro_batch_size: int
    budget_bytes: int
    floor_bytes: int
    predicted_peak_bytes: tuple[int, ...]
    """Whole process, of each module."""
    cache_tier: str
    cache_dtype: str
    cache_bytes: int
    """Most bytes of boundary activations at one time."""
    end_to_end_bytes: int
    """Predicted peak of plain end-to-end training at the full batch."""
    reasons: tuple[str, ...]

    def summary(self) -> str:
        """A few lines for people: what was chosen, why, and the predicted peak of each module."""
        peaks = ", ".join(format_size(peak) for peak in self.predicted_peak_bytes)
        lines = [
            f"{self.num_modules} modules, batch {self.batch_size} = {self.micro_batch_size} x {self.grad_accum_steps}",
            f"predicted peak {format_size(self.peak_bytes)} of {format_size(self.budget_bytes)} (by module: {peaks})",
            f"end-to-end would need {format_size(self.end_to_end_bytes)}",
            *self.reasons,
        ]
        return "\n".join(lines)

    @property
    def num_modules(self) -> int:
        return len(self.bounds) - 1

    @property
    def grad_accum_steps(self) -> int:
        return self.batch_size // self.micro_batch_size

    @property
    def peak_bytes(self) -> int:
        return max(self.predicted_peak_bytes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Plan":
        """The inverse of `to_dict`."""
        lists = ("bounds", "predicted_peak_bytes", "reasons")
        values: dict[str, Any] = {key: tuple(value) if key in lists else value for key, value in record.items()}
        return cls(**values)


@dataclass(frozen=True)
class _Candidate:
    bounds: tuple[int, ...]
    micro: int
    peaks: tuple[int, ...]

    @property
    def peak(self) -> int:
        return max(self.peaks)


def make_plan(
    chain: Chain, costs: Costs, config: TrainConfig, *, budget_bytes: int, floor_bytes: int, rows: int, train_rows: int
) -> Plan:
    """The plan for `rows` cached samples, `train_rows` of which are trained on.

    Raises BudgetInfeasibleError with the smallest budget that a plan exists for, PartitionError for a number of
    modules or a boundary that cannot be had.
    """
    batch = min(config.batch_size, train_rows)
    reasons = []
    if batch < config.batch_size:
        reasons.append(f"batch size {batch}: there are only {train_rows} training samples")
    planner = _Planner(chain, costs, config, floor_bytes, rows)
    best: _Candidate | None = None
    least_cache: int | None = None
    for candidate in planner.candidates(batch):
        if candidate.peak <= budget_bytes:
            cached = planner.cache_bytes(candidate)
            if planner.cache_tier != "disk" or cached <= (config.cache_limit_bytes or cached):
                return planner.plan(candidate, batch, budget_bytes, reasons)
            least_cache = min(cached, least_cache or cached)
        if best is None or candidate.peak < best.peak:
            best = candidate
    if least_cache is not None:
        raise UsageError(
            f"every plan within the budget caches {format_size(least_cache)} or more on disk, "
            f"the limit is {format_size(config.cache_limit_bytes or 0)}",
            hint="raise --cache-limit, or lower the need: --cache-dtype bf16, --train-limit, --image-size",
        )
    assert best is not None
    raise planner.refusal(best, budget_bytes)


class _Planner:
    def __init__(self, chain: Chain, costs: Costs, config: TrainConfig, floor: int, rows: int) -> None:
        self.chain, self.costs, self.config = chain, costs, config
        self.floor = floor
        widest = max(
            (row_bytes(a.out_shape, config.cache_dtype) for a in chain.segments[:-1]),
            default=0,
        )
        self.cache_tier = "disk" if config.cache == "auto" else config.cache
        # two boundaries stand at a time: the one that is read and the one that is written
        self.in_memory = 2 * rows * widest if self.cache_tier == "memory" else 0
        self.rows = rows

    def peak(self, start: int, stop: int, micro: int, *, accumulate: bool) -> int:
        tensors = self.costs.module_bytes(start, stop, micro, accumulate=accumulate)
        scratch = self.costs.scratch_bytes(start, stop, micro)
        above = UNMEASURED_SCRATCH * tensors if scratch is None else scratch + SLACK * tensors
        return self.floor + CODE_BYTES + int(tensors + above) + self.in_memory

    def candidates(self, batch: int) -> Iterator[_Candidate]:
        """In the order of preference: full batch before micro-batches, few modules before many."""
        fixed = self.config.micro_batch
        micros = _divisors(batch)
        if isinstance(fixed, int):  # the batch itself may be smaller than was asked for, with few samples
            micros = [micro for micro in micros if micro <= fixed][:1]
        for micro in micros:
            for bounds in self._groupings(micro, accumulate=micro < batch):
                yield self._candidate(bounds, micro, accumulate=micro < batch)

    def _candidate(self, bounds: tuple[int, ...], micro: int, *, accumulate: bool) -> _Candidate:
        return _Candidate(
            bounds, micro, tuple(self.peak(a, b, micro, accumulate=accumulate) for a, b in pairwise(bounds))
        )

    def _groupings(self, micro: int, *, accumulate: bool) -> Iterator[tuple[int, ...]]:
        asked = self.config.modules
        length = len(self.chain.segments)
        if isinstance(asked, tuple):
            yield named_bounds(self.chain, asked)
            return
        if isinstance(asked, int):
            check_count(self.chain, asked)
        table = {
            (a, b): self.peak(a, b, micro, accumulate=accumulate)
            for a in range(length)
            for b in range(a + 1, length + 1)
        }
        most = asked if isinstance(asked, int) else length
        groupings = balance(most, length, lambda a, b: table[a, b])
        yield from groupings[-1:] if isinstance(asked, int) else groupings[min(2, length) - 1 :]

    def cache_bytes(self, candidate: _Candidate) -> int:
        """Most bytes of boundary activations at one time: the one that is read and the one that is written."""
        sizes = [
            row_bytes(self.chain.segments[b - 1].out_shape, self.config.cache_dtype) for b in candidate.bounds[1:-1]
        ]
        return self.rows * max(a + b for a, b in zip([0, *sizes], [*sizes, 0], strict=True))

    def plan(self, chosen: _Candidate, batch: int, budget: int, reasons: list[str]) -> Plan:
        config, count = self.config, len(chosen.bounds) - 1
        if config.modules != "auto":
            reasons.append(f"{count} modules, as asked")
        else:
            reasons.append(f"{count} modules: the fewest that fit {format_size(budget)} at micro-batch {chosen.micro}")
        whole = self.peak(0, len(self.chain.segments), batch, accumulate=False)
        if whole <= budget and count > 1:
            reasons.append(
                f"end-to-end would fit in the budget (predicted {format_size(whole)}); "
                "--modules 1 trains that way, more modules leave memory to the rest of the device"
            )
        if chosen.micro < batch:
            reasons.append(
                f"micro-batch {chosen.micro}, accumulated {batch // chosen.micro} times: a full batch of {batch} does "
                "not fit; BatchNorm then sees micro-batches, so results differ a little from the full batch"
                if config.micro_batch == "auto"
                else f"micro-batch {chosen.micro}, as asked"
                if config.micro_batch == chosen.micro
                else f"micro-batch {chosen.micro}: of at most {config.micro_batch}, the largest that divides {batch}"
            )
        reasons.append(
            f"cache on {self.cache_tier}: "
            + ("as asked" if config.cache != "auto" else "the kernel keeps in RAM what is free, and can take it back")
        )
        return Plan(
            bounds=chosen.bounds,
            batch_size=batch,
            micro_batch_size=chosen.micro,
            budget_bytes=budget,
            floor_bytes=self.floor,
            predicted_peak_bytes=chosen.peaks,
            cache_tier=self.cache_tier,
            cache_dtype=config.cache_dtype,
            cache_bytes=self.cache_bytes(chosen),
            end_to_end_bytes=whole,
            reasons=tuple(reasons),
        )

    def refusal(self, best: _Candidate, budget: int) -> BudgetInfeasibleError:
        worst = max(range(len(best.peaks)), key=best.peaks.__getitem__)
        segments = self.chain.segments[best.bounds[worst] : best.bounds[worst + 1]]
        needed = -(-best.peak // 1_000_000) * 1_000_000
        below = " (the floor alone is above it)" if budget < self.floor else ""
        pinned = [
            f"--{name} auto"
            for name, value in (("modules", self.config.modules), ("micro-batch", self.config.micro_batch))
            if value != "auto"
        ]
        ways = [*pinned, "--image-size with a smaller side"]
        if self.config.optimizer == "adamw":
            ways.append("--optimizer sgd")
        if self.config.head not in ("pooled-linear", "mlp"):
            ways.append("--head pooled-linear")
        return BudgetInfeasibleError(
            f"nothing fits the budget of {format_size(budget)}{below}: module {worst} ({segments[0].name}"
            f"{'..' + segments[-1].name if len(segments) > 1 else ''}) needs {format_size(best.peak)} at micro-batch "
            f"{best.micro}, of which {format_size(self.floor)} is the floor (Python, torch and this program)",
            budget_bytes=budget,
            smallest_feasible_budget_bytes=needed,
            hint=f"the smallest feasible budget is {needed // 1_000_000}MB; or lower the need: {', '.join(ways)}",
        )


def _divisors(batch: int) -> list[int]:
    """Largest first."""
    return [micro for micro in range(batch, 0, -1) if batch % micro == 0]
