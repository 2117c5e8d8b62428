"""The parallel schedule: every batch goes through all modules, each of which makes a step of its own on the way.

What a module puts out, by its weights from before its step, goes on to the next detached, and its graph is gone before
that one runs. Weights and optimizer state of all modules stay in memory, activations and gradients of one at a time;
nothing is cached but what a frozen front puts out, which is passed through once before, and what the last module puts
out, once, for the network's own classifier, which trains behind them.
(arXiv 2309.17357, section 3.3)
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import torch

from ondevice_trgl.device.randomness import Randomness
from ondevice_trgl.errors import NonFiniteError
from ondevice_trgl.model.store import parameter_count
from ondevice_trgl.run.batches import Source, mix, place
from ondevice_trgl.run.boundaries import SPLITS, ahead
from ondevice_trgl.run.measured import Measured, Paused
from ondevice_trgl.run.position import Position
from ondevice_trgl.run.relay import Relay
from ondevice_trgl.run.scheduler import Scheduler
from ondevice_trgl.run.stepper import SPILLED, Stepper
from ondevice_trgl.run.stepping import located, stepper_of
from ondevice_trgl.run.sweep import Swept, swept_through
from ondevice_trgl.trgl.multiplier import Multiplier
from ondevice_trgl.trgl.step import Tally

_WATCHED_STEPS = 2
"""Of a sitting, in which every module's own peak is measured; behind them it is the process's alone."""


@dataclass
class _Part:
    """A module in training."""

    index: int
    stepper: Stepper
    measured: Measured
    multiplier: Multiplier | None = None
    tally: Tally = field(default_factory=Tally)


class Parallel(Scheduler):
    """Runs a partition under a plan, all modules at once. Everything that it learns is in the store."""

    def fit(self) -> None:
        """Train from wherever the store says that the run stands. Raises Paused after a requested pause."""
        context, progress, plan = self.context, self.context.progress, self.context.plan
        if all(self._is_done(0, index) for index in range(plan.num_parts)):
            return
        progress.call("on_lap_start")
        for index in range(plan.passed):
            if not self._is_done(0, index):
                self._reach(index)
                self._train(0, index)
        if context.boundaries.index < plan.passed:
            self._reach(plan.passed)
        parts, trained = self._parts(), self._is_done(0, plan.num_modules - 1)
        if trained:
            self._sweep(parts, trained=True)  # what the classifier reads is gone
        else:
            progress.call("on_module_start")
            self._train_all(parts)
            self._finish(parts)
        for part in parts:
            part.stepper.close()
            context.evict(part.index)
        del parts, part, self._relay
        context.budget.make_room()  # before the classifier's own peak is taken
        progress.together = False
        if plan.classifier and not self._is_done(0, plan.num_modules):
            context.boundaries.advance(by=plan.num_trained)
            self._train(0, plan.num_modules)
        progress.call("on_lap_end")

    def _stage(self, index: int) -> int:
        return int(index >= self.context.plan.num_modules)  # the modules, then the classifier

    def _parts(self) -> list[_Part]:
        """Every module and head in memory, with its optimizer state."""
        context, progress, budget = self.context, self.context.progress, self.context.budget
        modules = context.partition.modules[context.plan.passed : context.plan.num_modules]
        progress.module_name, progress.module_epochs = f"all {len(modules)} modules", context.config.epochs
        progress.together, progress.stage = True, 0
        progress.enter("load", 0)
        self._note_peak()
        if budget.has_changed(larger=True):
            budget.take()
            budget.begin()
            progress.budget_bytes = budget.bytes
            context.run.event("budget", lap=0, module=0, budget_bytes=budget.bytes)
        budget.between_modules()
        parts = []
        for index, module in enumerate(modules, context.plan.passed):
            context.load(index)
            position = self.checkpointer.position(index)
            multiplier = Multiplier.of(context.config, position.measured.multiplier if position.is_begun else None)
            pressed = partial(self._pressed, 0, index)
            stepper = stepper_of(context, index, position, multiplier, lowest=self._lowest.get(index), pressed=pressed)
            measured = dataclasses.replace(
                position.measured,
                params=parameter_count(module, context.heads[index]),
                frozen=module.frozen,
            )
            if multiplier is not None and not position.laps_done:
                measured.multiplier = multiplier.value if stepper.objective.measures_transport else None
            # all that stays is there before the first step: what comes later is another's, or the app's
            budget.attempt(stepper.optimizer.allocate, f"optimizer state of module {index}")
            stepper.objective.train_mode(True)
            parts.append(_Part(index, stepper, measured, multiplier, dataclasses.replace(position.tally)))
        self._at_work = {part.index: part.stepper.rung for part in parts}
        self.sitting.at(0, self._at_work)
        self._relay = Relay(context.plan.batch_size, [module.out_shape for module in modules[:-1]], context.device)
        self._steps_here = 0
        return parts

    def _train_all(self, parts: list[_Part]) -> None:
        """All epochs that are left. Raises Paused, NonFiniteError, BudgetExceededError, StorageError."""
        position = self.checkpointer.position(parts[0].index)
        random = self.context.store.load_extra(parts[0].index, "run", torch.device("cpu"))
        Randomness.of(random).restore(self.context.device)
        self._reached = position.epoch, position.step
        for epoch in range(position.epoch, self.context.config.epochs):
            self._epoch(parts, epoch, position.step if epoch == position.epoch else 0)

    def _epoch(self, parts: list[_Part], epoch: int, done: int) -> None:
        context, progress, config = self.context, self.context.progress, self.context.config
        batch, self._source = context.plan.batch_size, context.boundaries.training(epoch)
        order = context.boundaries.order(epoch, config, 0, 0)
        progress.start_epoch(epoch, done)
        if not done:
            context.seed(mix(config.seed, 0, 0, epoch, 1))
            for part in parts:
                part.tally = Tally()
        progress.tally = parts[-1].tally
        progress.call("on_epoch_start")
        for start in range(done * batch, len(order) - batch + 1, batch):
            ahead(self._source, order[start + batch : start + 2 * batch])
            self._step(parts, order[start : start + batch])
        self._note(parts)
        for part in parts:
            context.run.event(
                "epoch", lap=0, module=part.index, epoch=epoch, task_loss=part.measured.train_loss,
                transport_cost=part.measured.transport_cost, train_accuracy=part.tally.accuracy(),
                peak_bytes=part.measured.measured_peak_bytes,
            )  # fmt: skip
        progress.call("on_epoch_end")

    def _step(self, parts: list[_Part], indices: list[int]) -> None:
        """One step of every module."""
        progress, budget = self.context.progress, self.context.budget
        progress.call("on_step_start")
        self._follow_the_budget(parts)
        # where memory fails in the middle, some have made this step and others have not: the last checkpoint holds
        self._through(parts, self._source, indices)
        progress.step += 1
        self._reached = progress.reached()
        self._steps_here += 1
        progress.call("on_step_end")
        progress.rest()
        if (peak := self._note_peak()) > budget.bytes:
            max(parts, key=lambda part: part.stepper.rung.peak_bytes).stepper.overran(peak)
            self.context.meter.reset()
        if progress.pause.is_set():
            self._pause(parts)
        if self.checkpointer.is_due():
            self._checkpoint(parts)

    def _pause(self, parts: list[_Part]) -> NoReturn:
        """Stop here, with the training kept as it stands. Raises Paused."""
        self._checkpoint(parts)
        self._tell_of_pause(0, *self._reached)
        raise Paused

    def _through(self, parts: list[_Part], source: Source, indices: list[int]) -> None:
        """The samples `indices` through all modules, each of which makes its step."""
        context, relay = self.context, self._relay
        modules, rate = context.partition.modules, self._lr()
        relay.begin(source.labels[indices], modules[parts[0].index].out_shape)
        at: Sequence[int] = indices
        for part in parts:
            started, is_last = time.perf_counter(), part is parts[-1]
            if watched := self._steps_here < _WATCHED_STEPS:
                self._note_peak()
                context.meter.reset()
            try:
                if part.stepper.optimizer.parameters:
                    tally = part.stepper.step(source, at, rate, None if is_last else relay)
                    part.tally.add(tally)
                    self._move(part, tally)
            except NonFiniteError as error:
                where = f"module {part.index} ({modules[part.index].label})"
                data = place(part.index, "train")
                raise located(error, context.progress, where, data, source, at, part.stepper.buffer) from error
            if watched:
                peak = self._note_peak()
                part.measured.measured_peak_bytes = max(part.measured.measured_peak_bytes, peak)
            part.measured.train_seconds += time.perf_counter() - started
            if part.stepper.optimizer.parameters:
                part.measured.epochs_done += 1.0 / context.progress.steps
            if not is_last:
                relay.advance(modules[part.index + 1].out_shape)
                source, at = relay, range(len(indices))

    def _move(self, part: _Part, tally: Tally) -> None:
        """The multiplier of `part`, behind the step that `tally` is of."""
        if part.multiplier is None or part.measured.multiplier is None:
            return
        progress = self.context.progress
        part.multiplier.after(progress.epoch * progress.steps + progress.step + 1, tally.task_loss / tally.samples)
        part.measured.multiplier = part.multiplier.value

    def _lr(self) -> float:
        progress = self.context.progress
        done = (progress.epoch * progress.steps + progress.step) / (progress.module_epochs * progress.steps)
        return self.context.config.learning_rate_at(done)

    def _follow_the_budget(self, parts: list[_Part]) -> None:
        """Let a smaller budget take effect."""
        context, budget = self.context, self.context.budget
        if not budget.has_changed(larger=False):
            return
        self._note_peak()
        largest = max(parts, key=lambda part: part.stepper.rung.peak_bytes)
        if context.spill_cache(largest.stepper.rung.peak_bytes):
            self._source = context.boundaries.training(context.progress.epoch)
            self._pressed(0, largest.index, SPILLED, largest.stepper.rung)
        budget.take()
        context.progress.budget_bytes = budget.bytes
        context.run.event("budget", lap=0, module=0, budget_bytes=budget.bytes)
        for part in parts:
            part.stepper.fit()
        budget.begin()

    def _note(self, parts: list[_Part]) -> None:
        """Take the epoch's means into the modules' figures."""
        for part in parts:
            part.measured.train_loss = part.tally.mean_task_loss()
            part.measured.transport_cost = part.tally.mean_transport()

    def _note_peak(self) -> int:
        """Take the meter's peak, which is returned, into the run's figures."""
        peak, progress = self.context.budget.note_peak(), self.context.progress
        self.peak_outside = max(self.peak_outside, peak)
        progress.peak_bytes = max(progress.peak_bytes or 0, peak)
        return peak

    def _checkpoint(self, parts: list[_Part]) -> None:
        """Save all modules in mid-training, at once."""
        epoch, step = self._reached
        self._note(parts)
        random = self.context.random_state() if step else {}
        for part in parts:
            position = Position(0, epoch, step, part.measured, part.tally, part.stepper.rung)
            self.checkpointer.save(part.index, position, optim=part.stepper.optimizer.state, run=random, pending=True)
        self.checkpointer.commit()

    def _finish(self, parts: list[_Part]) -> None:
        """The accuracies of all heads, and the last checkpoint."""
        context, progress = self.context, self.context.progress
        started = time.perf_counter()
        swept = self._sweep(parts, trained=False)
        seconds = (time.perf_counter() - started) / len(parts)
        parts[-1].measured.cache_write_bytes += context.boundaries.traffic()[1]
        self._note_peak()
        for part, found in zip(parts, swept, strict=True):
            measured = part.measured
            measured.cache_seconds += seconds
            measured.train_accuracy, measured.val_accuracy, measured.test_accuracy = (
                found.accuracy.get(split) for split in SPLITS
            )
            measured.train_rmse, measured.val_rmse, measured.test_rmse = map(found.rmse.get, SPLITS)
            # at this rung's micro-batch the accuracies come out again
            position = Position(laps_done=1, measured=measured, rung=part.stepper.rung)
            self.checkpointer.save(part.index, position, optim={}, run=found.probabilities, pending=True)
        self.checkpointer.commit()
        progress.together = False
        for part in parts:
            progress.module, progress.module_name = part.index, context.partition.modules[part.index].label
            progress.train_accuracy, progress.val_accuracy = part.measured.train_accuracy, part.measured.val_accuracy
            context.run.event("module_end", lap=0, module=part.index, **vars(part.measured))
            progress.call("on_module_end")

    def _sweep(self, parts: list[_Part], *, trained: bool) -> list[Swept]:
        """Every sample through the modules; what the last puts out is cached where a classifier follows.

        Raises Paused, with the training kept as it stands; where they are `trained` it is kept already.
        """
        context = self.context
        try:
            return swept_through(
                [part.stepper for part in parts],
                context.boundaries,
                context.progress,
                [context.partition.modules[part.index] for part in parts],
                context.device,
                context.budget,
                self._relay,
                context.plan.batch_size,
                write=context.plan.classifier,
            )
        except Paused:
            if not trained:
                self._pause(parts)
            self._tell_of_pause(0)
            raise
