"""The run itself: for each lap, for each module: load, train on the boundary before it, write its own, evict."""

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from ondevice_trgl.plan.plan import Rung, rung_within
from ondevice_trgl.run.checkpointer import Checkpointer
from ondevice_trgl.run.context import Context
from ondevice_trgl.run.lineage import Lineage, take_up
from ondevice_trgl.run.measured import Paused
from ondevice_trgl.run.module_run import ModuleRun
from ondevice_trgl.run.sitting import Sitting
from ondevice_trgl.run.stalled import has_stalled
from ondevice_trgl.run.stepper import SPILLED, Pressure


@dataclass
class Scheduler:
    """Runs a partition under a plan. Everything it needs is in `context`; everything it learns is in the store."""

    context: Context
    checkpointer: Checkpointer
    peak_outside: int = 0
    """Highest measured outside of every module's own time: set-up, and caching again after a resume."""
    pressures: list[dict[str, Any]] = field(default_factory=list)
    """Every time that memory ran short: where, why, and what was done."""
    stopped_behind: int | None = None
    """The module that was the last to be trained, where deeper ones no longer helped."""
    _lowest: dict[int, Rung] = field(default_factory=dict)
    """Rungs that modules had to go down to."""
    _at_work: dict[int, Rung] = field(default_factory=dict)
    """The modules that are in memory, and how they are trained."""
    _looked: bool = False
    """Whether this sitting has looked for what an earlier one left."""

    @cached_property
    def sitting(self) -> Sitting:
        """What this sitting leaves for the next, where it is killed."""
        return Sitting(self.context.run, self.context.plan)

    @cached_property
    def _lineage(self) -> Lineage:
        return Lineage(self.context)

    def fit(self) -> None:
        """Train from wherever the store says that the run stands. Raises Paused after a requested pause."""
        context = self.context
        last = len(context.heads) - 1
        for lap in range(context.config.laps):
            context.progress.lap = lap
            if all(self._is_done(lap, index) for index in range(last + 1)):
                continue
            context.progress.call("on_lap_start")
            context.boundaries.begin_lap(lap)
            for index in range(last + 1):
                if not self._is_done(lap, index):
                    self._reach(index)
                    self._train(lap, index)
                if self._has_stalled(index):
                    self.stopped_behind = index
                    context.run.event("stopped", module=index)
                    break
            context.progress.call("on_lap_end")

    def _has_stalled(self, index: int) -> bool:
        """Whether modules behind `index` are not to be trained, as deeper ones have not helped."""
        context, plan = self.context, self.context.plan
        if context.config.stop_when != "stalled" or index + 1 >= plan.num_modules:
            return False
        heads = [self.checkpointer.position(k).measured.val_accuracy for k in range(plan.passed, index + 1)]
        samples = len(context.boundaries.source("val").labels)
        return has_stalled([h for h in heads if h is not None], samples, context.task.metric)

    def _is_done(self, lap: int, index: int) -> bool:
        return self.checkpointer.position(index).laps_done > lap

    def _reach(self, index: int) -> None:
        """Bring the boundary in front of module `index` back, where a resumed run lacks it."""
        context = self.context
        if not self._looked:
            self._looked = True
            if context.boundaries.index < index:
                take_up(context, self._lineage, index)
        while context.boundaries.index < index:
            before = context.boundaries.index
            context.at(before)
            context.load(before)
            rung = rung_within(context.plan.ladders[before], context.budget.room)
            try:
                context.sweep(before, context.objective(before, rung), context.buffer(before, rung), write=True)
            except Paused:
                self._tell_of_pause(before)
                raise
            context.evict(before)
            self._advance()

    def _train(self, lap: int, index: int) -> None:
        context, progress, budget = self.context, self.context.progress, self.context.budget
        context.at(index)
        progress.stage = self._stage(index)
        progress.module_epochs = context.warm_epochs(index, lap) + context.epochs(index)
        progress.enter("load", 0)
        self.peak_outside = max(self.peak_outside, budget.note_peak())
        has_changed = budget.has_changed(larger=True)
        if context.spill_cache(context.plan.rungs[index].peak_bytes):
            self._tell(lap, index, SPILLED)
        if has_changed:
            budget.take()
            budget.begin()
            progress.budget_bytes = budget.bytes
            context.run.event("budget", lap=lap, module=index, budget_bytes=budget.bytes)
        context.meter.reset()
        budget.between_modules()
        context.load(index)
        progress.train_accuracy = progress.val_accuracy = None
        progress.call("on_module_start")
        context.run.event("module_start", lap=lap, module=index, name=progress.module_name)
        pressed = partial(self._pressed, lap, index)
        module = ModuleRun(context, self.checkpointer, lap, index, lowest=self._lowest.get(index), pressed=pressed)
        self._at_work = {index: module.stepper.rung}
        self.sitting.at(lap, self._at_work)
        module.train()
        module.finish()
        del module
        context.evict(index)
        budget.enforce()  # what was planned for this module holds no more
        if index == len(context.heads) - 1:
            context.boundaries.rewind()
        else:
            self._advance()

    def _advance(self) -> None:
        boundaries = self.context.boundaries
        boundaries.advance(producer=self._lineage.of(boundaries.index + 1) if boundaries.tier == "disk" else "")

    def _tell_of_pause(self, module: int, epoch: int = 0, step: int = 0) -> None:
        progress = self.context.progress
        self.context.run.event("pause", lap=progress.lap, module=module, epoch=epoch, step=step)
        progress.call("on_pause")

    def _stage(self, index: int) -> int:
        """Of the stretches that a lap goes through, the one of module `index`."""
        return index

    def _pressed(self, lap: int, index: int, pressure: Pressure, rung: Rung) -> None:
        self._lowest[index] = rung
        self._tell(lap, index, pressure)
        self._at_work[index] = rung
        self.sitting.at(lap, self._at_work)

    def go_lower(self) -> None:
        """Where the sitting before was killed for want of memory, let what it was at go on a rung further down."""
        lap, rungs = self.sitting.killed_for_memory() or (0, {})
        for index, rung in rungs.items():
            ladder = self.context.plan.ladders[index]
            below = ladder[min(ladder.index(rung) + 1, len(ladder) - 1)]
            self._lowest[index] = below
            after = str(below) if below != rung else f"{rung}, and nothing smaller is left"
            self._tell(lap, index, Pressure("the process before was killed for want of memory", str(rung), after))

    def _tell(self, lap: int, index: int, pressure: Pressure) -> None:
        progress = self.context.progress
        place = {"lap": lap, "module": index, "epoch": progress.epoch, "step": progress.step}
        self.pressures.append({**place, **vars(pressure)})
        self.context.run.event("pressure", **place, **vars(pressure))
        progress.call("on_budget_pressure")
