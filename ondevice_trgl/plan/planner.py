"""Costs + budget -> Plan. Accuracy first, then speed: the fewest modules that fit at the full batch; then activation
checkpointing inside a module; then smaller micro-batches; then a narrower cache.

Without BatchNorm accumulated micro-batches give the same gradients at no extra arithmetic: there they come before
checkpointing, which computes every forward pass twice.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.model.bounds import balance, check_count, named_bounds
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.plan.breakdown import Breakdown
from ondevice_trgl.plan.caching import Caching
from ondevice_trgl.plan.candidate import Candidate
from ondevice_trgl.plan.costs import Costs
from ondevice_trgl.plan.cuts import can_be_cut, can_end, no_cut
from ondevice_trgl.plan.falsify import falsified
from ondevice_trgl.plan.fewest import Fewest
from ondevice_trgl.plan.front import front_within
from ondevice_trgl.plan.levels import levels_of
from ondevice_trgl.plan.others import NO_OTHERS, Others, others_of
from ondevice_trgl.plan.pareto import Choice, thinned, unbeaten
from ondevice_trgl.plan.plan import Level, Plan, Rung
from ondevice_trgl.plan.predict import MOST_SHARE, Measured, Predictor
from ondevice_trgl.plan.reasons import reasons_for, refusal
from ondevice_trgl.tasks import AUTO

LEAST_SCRATCH, SCRATCH = 0.06, 0.20
"""What kernels and the allocator take beside the tensors, as a share of those that move (see `predict`), measured on
two cores with torch 2.13: where a rehearsal will find out, and where none will."""


def make_plan(
    chain: Chain,
    costs: Costs,
    config: TrainConfig,
    *,
    budget_bytes: int,
    floor_bytes: int,
    rows: int,
    train_rows: int,
    val_rows: int = 0,
    measured: Measured | None = None,
    scratch: float = SCRATCH,
    scale: float = 1.0,
    set_up_bytes: int = 0,
    pareto: bool = False,
    pinned_bytes: int | None = None,
    disk_is_ram: bool = False,
) -> Plan:
    """The plan for `rows` cached samples, `train_rows` of which are trained on and `val_rows` validated on.

    `scratch` is the share of the tensors that is allowed for beside them in modules that were not measured, `scale`
    what predictions above the floor are multiplied with (see `falsify`), `set_up_bytes` what the processes that set the
    run up took at most. On a GPU `pinned_bytes` of RAM may be pinned for the cache. With `disk_is_ram` a cache on disk
    counts. With `pareto` the plan lists what else could be chosen, which takes a second or two for a deep network.

    Raises BudgetInfeasibleError with the smallest budget that a plan exists for, PartitionError for a number of
    modules or a boundary that cannot be had, UsageError where the cache has no room whatever the budget.
    """
    counts, known = (rows, train_rows, val_rows), measured or {}
    planner = Planner(chain, costs, config, floor_bytes, counts, known, scratch, scale, pinned_bytes, disk_is_ram)
    caching, too_large = planner.caching, []
    for candidate in planner.candidates(budget_bytes):
        if (dtype := caching.dtype(candidate.bounds)) is not None:
            others = thinned(unbeaten(planner.choices(dtype))) if pareto else ()
            plan = planner.plan(candidate, dtype, budget_bytes)
            return dataclasses.replace(plan, set_up_bytes=set_up_bytes, pareto=others)
        too_large.append(candidate.bounds)
    smallest = planner.smallest()
    needs = [planner.fewest.worst(a, b) for a, b in pairwise(smallest.bounds)]
    raise refusal(
        chain, config, smallest.bounds, smallest.ladders, budget_bytes, floor_bytes, needs, exact=planner.exact,
        cache=caching.too_little_room(too_large) if too_large else "",
    )  # fmt: skip


class Planner:
    """Predicts what any module takes on any level, and goes through the ways to cut the network."""

    def __init__(
        self,
        chain: Chain,
        costs: Costs,
        config: TrainConfig,
        floor: int,
        counts: tuple[int, int, int],
        measured: Measured,
        scratch: float,
        scale: float,
        pinned_bytes: int | None,
        disk_is_ram: bool,
    ) -> None:
        self.chain, self.config = chain, config
        rows, train_rows, val_rows = counts
        self.floor, self.rows, self.train_rows = floor, rows, train_rows
        self.batch = min(config.batch_size, train_rows)
        self.parallel = config.schedule == "parallel"
        self.caching = Caching(chain, config, rows, pinned_bytes)
        in_ram = (self.caching.tier == "memory" or disk_is_ram) and pinned_bytes is None
        self.beside = self.caching.widest_two if in_ram else 0
        self.trunk = chain.trunk if can_end(chain, chain.trunk) else len(chain.segments)
        self.beside += 4 * val_rows * chain.num_outputs  # predictions of the validation samples
        if config.metric != AUTO:  # which is given those of a whole split, of every module that trains side by side
            most = len(chain.segments) if self.parallel else 1
            self.beside += 4 * rows * chain.num_outputs * most
        self.costs = costs
        self.fewest = Fewest(chain, config)
        self.levels = levels_of(config, self.batch, exact=self.fewest.exact, on_gpu=pinned_bytes is not None)
        self.predictor = Predictor(costs, self.batch, measured, scratch, scale)
        self.scale, self.exact = scale, self.fewest.exact
        self._front: tuple[int, ...] = (0,)

    def rung(self, start: int, stop: int, level: Level, others: Others = NO_OTHERS) -> Rung:
        """Segments `start` to `stop` on `level`, with the predicted peak of the whole process."""
        known = self.predictor.rehearsed(start, stop, level)
        peak = self.floor + self.predictor.above(start, stop, level) + self.beside + others.than(start)
        is_measured = known is not None and known.is_direct
        return Rung(level.micro, level.checkpointed, peak, is_measured, level.spilled)

    def _others(self, bounds: Sequence[int]) -> Others:
        """What the modules that `bounds` make keep in memory beside the one that is at work."""
        modules = [bound for bound in bounds if bound >= self.chain.prefix]
        modules = modules[:-1] if self.caching.ends_apart(bounds) else modules
        return others_of(modules, self.costs, self.batch) if self.parallel else NO_OTHERS

    def breakdown(self, start: int, stop: int, rung: Rung, others: Others) -> Breakdown:
        """What the bytes of the peak of these segments on `rung` are for."""
        tensors = self.predictor.tensors(start, stop, rung.level)
        activations = tensors.activations + self.beside + others.handed(start)
        tensors = dataclasses.replace(tensors, activations=activations, others=others.still(start))
        return tensors.with_total(rung.peak_bytes, floor=self.floor)

    def ladder(self, start: int, stop: int, others: Others = NO_OTHERS) -> tuple[Rung, ...]:
        """The ways to train these segments as one module: in the order of preference, each taking less memory."""
        rungs: list[Rung] = []
        for level in self.levels:
            if level.checkpointed and stop - start < 2:
                continue  # its one segment would be computed again at once
            if level.micro < self.fewest(start, stop):
                continue
            rung = self.rung(start, stop, level, others)
            if not rungs or rung.peak_bytes < rungs[-1].peak_bytes:
                rungs.append(rung)
        return tuple(rungs)

    def candidates(self, budget: int) -> Iterator[Candidate]:
        """What fits, in the order of preference: level by level, few modules before many."""
        self._front = front_within(self.chain, self.ladder, budget)
        for number, level in enumerate(self.levels):
            levels = self.levels[: number + 1]
            finest = range(len(self.chain.segments) + 1)
            if self.config.modules == "auto" and not self._fit(finest, levels, budget, any_samples=True):
                continue
            for bounds in self._groupings(level):
                if self._fit(bounds, levels, budget):
                    yield self._candidate(bounds)

    def _candidate(self, bounds: tuple[int, ...]) -> Candidate:
        others = self._others(bounds)
        return Candidate(bounds, tuple(self.ladder(a, b, others) for a, b in pairwise(bounds)))

    def _fit(self, bounds: Sequence[int], levels: Sequence[Level], budget: int, *, any_samples: bool = False) -> bool:
        """Whether every module fits on one of `levels`; with `any_samples`, of those too that its norms refuse."""
        others = NO_OTHERS if any_samples else self._others(bounds)
        return all(
            any(
                self.rung(a, b, level, others).peak_bytes <= budget
                for level in (self.levels if b <= self.chain.prefix else levels)  # what is not trained loses nothing
                if any_samples or level.micro >= self.fewest(a, b)
            )
            for a, b in pairwise(bounds)
        )

    def choices(self, timed: str) -> Iterator[Choice]:
        """Every way to train the network with all modules on one level, whatever the budget.

        `timed` is the number format of the cache that rehearsals wrote; no other has seconds.
        """
        for level in self.levels:
            if level.spilled:
                continue  # a last resort, and no choice
            for bounds in self._groupings(level):
                spans = [
                    (a, b, dataclasses.replace(level, checkpointed=level.checkpointed and b - a > 1))
                    for a, b in pairwise(bounds)
                ]
                if any(level.micro < self.fewest(a, b) for a, b in pairwise(bounds)):
                    continue
                others = self._others(bounds)
                candidate = Candidate(bounds, tuple((self.rung(*span, others),) for span in spans))
                if level.checkpointed and not any(one.checkpointed for _, _, one in spans):
                    continue
                seconds = [self._seconds(*span) for span in spans]
                known = [value for value in seconds if value is not None]
                for dtype in self.caching.dtypes:
                    yield Choice(
                        modules=len(spans) - self.caching.ends_apart(bounds),
                        micro_batch=level.micro,
                        checkpointed=level.checkpointed,
                        cache_dtype=dtype,
                        predicted_peak_bytes=candidate.least,
                        seconds_per_epoch=sum(known) if dtype == timed and len(known) == len(spans) else None,
                        cache_bytes=self.caching.bytes(bounds, dtype),
                    )

    def _seconds(self, start: int, stop: int, level: Level) -> float | None:
        """Estimate of an epoch of these segments: steps, and a share of the one sweep behind all epochs."""
        known = self.predictor.rehearsed(start, stop, level)
        if known is None or known.step_seconds is None or known.sweep_seconds is None:
            return None
        steps = self.train_rows // self.batch * (self.batch // level.micro)
        return steps * known.step_seconds + -(
            -self.rows // level.micro
        ) * known.sweep_seconds / self.config.mean_epochs(1)

    def _groupings(self, level: Level) -> Iterator[tuple[int, ...]]:
        """Bounds of what was asked for; behind several modules, or one, the classifier comes as one of its own."""
        asked, first = self.config.modules, self.chain.prefix
        whole, length = len(self.chain.segments), self.trunk
        tail = (whole,) if length < whole else ()
        if isinstance(asked, tuple):
            bounds = tuple(sorted({*named_bounds(self.chain, asked), first}))
            if bounds[-2] < length < whole:
                bounds = (*bounds[:-1], length, whole)
            if not can_be_cut(self.chain, bounds):
                raise no_cut(self.chain, bounds)
            yield bounds
            return
        if isinstance(asked, int):
            check_count(self.chain, asked, max(1, length - first))
        if asked == 1 or length <= first:
            yield (*self._front, whole)
            return
        table = {
            # tensors alone: what was measured differs a little from time to time, and the cuts should not
            (a, b): self.predictor.tensors(a, b, level).total if can_end(self.chain, b) else math.inf
            for a in range(first, length)
            for b in range(a + 1, length + 1)
        }
        most = asked if isinstance(asked, int) else length - first
        groupings = balance(most, length - first, lambda a, b: table[first + a, first + b])
        fewest = 1 if first else min(2, length)  # behind a frozen front one module is local too
        groupings = groupings[-1:] if isinstance(asked, int) else groupings[fewest - 1 :]
        ways = [(*self._front, *(first + bound for bound in bounds[1:]), *tail) for bounds in groupings]
        possible = [bounds for bounds in ways if can_be_cut(self.chain, bounds)]
        if not possible:
            raise no_cut(self.chain, ways[0])
        yield from possible

    def smallest(self) -> Candidate:
        """What needs least, with enough allowed for beside the tensors.

        Raises ConfigError or DataError where the samples that were asked for are too few for a norm in any of them,
        UsageError where the cache has no room for any.
        """
        self.predictor = self.predictor.allowing(MOST_SHARE)
        self._front = front_within(self.chain, self.ladder, 0)
        levels = self.levels if self.config.cache_limit_bytes else self.levels[-1:]  # less memory is not less disk
        groupings = list({bounds: None for level in levels for bounds in self._groupings(level)})
        kept = [bounds for bounds in groupings if self.caching.dtype(bounds) is not None]
        if not kept:
            raise self.caching.no_room(groupings)
        found = [
            self._candidate(bounds)
            for bounds in kept
            if all(self.fewest(a, b) <= self.levels[0].micro for a, b in pairwise(bounds))
        ]
        if not found:
            raise self.fewest.too_few(self.levels[0].micro, self.batch, kept[0])
        return min(found, key=lambda candidate: candidate.least)

    def plan(self, chosen: Candidate, dtype: str, budget: int) -> Plan:
        """The plan that trains `chosen`."""
        whole = self.rung(0, len(self.chain.segments), Level(self.batch, False)).peak_bytes
        others = self._others(chosen.bounds)
        plan = Plan(
            bounds=chosen.bounds,
            batch_size=self.batch,
            ladders=chosen.ladders,
            budget_bytes=budget,
            floor_bytes=self.floor,
            cache_tier=self.caching.tier,
            cache_dtype=dtype,
            cache_bytes=self.caching.bytes(chosen.bounds, dtype),
            end_to_end_bytes=whole,
            reasons=(),
            classifier=self.caching.ends_apart(chosen.bounds),
            passed=sum(stop <= self.chain.prefix for stop in chosen.bounds[1:]),
            breakdowns=tuple(
                tuple(self.breakdown(a, b, rung, others) for rung in ladder)
                for (a, b), ladder in zip(pairwise(chosen.bounds), chosen.ladders, strict=True)
            ),
        )
        plan = reasons_for(plan, self.config, self.train_rows, exact=self.exact)
        return dataclasses.replace(plan, reasons=(*plan.reasons, *falsified(self.scale)))
