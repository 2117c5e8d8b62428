"""One module in one lap: its epochs and steps from wherever it stands, then the sweep that leaves its boundary."""

import dataclasses
import time
from collections.abc import Sequence
from typing import NoReturn

import torch

from ondevice_trgl.device.randomness import Randomness
from ondevice_trgl.errors import BudgetExceededError, NonFiniteError
from ondevice_trgl.model.store import parameter_count
from ondevice_trgl.plan.plan import Rung
from ondevice_trgl.run.batches import Source, mix, place
from ondevice_trgl.run.best import Best
from ondevice_trgl.run.boundaries import SPLITS, ahead
from ondevice_trgl.run.checkpointer import Checkpointer
from ondevice_trgl.run.context import Context
from ondevice_trgl.run.measured import Paused
from ondevice_trgl.run.position import Position
from ondevice_trgl.run.stepper import SPILLED
from ondevice_trgl.run.stepping import Pressed, located, stepper_of
from ondevice_trgl.run.sweep import Swept
from ondevice_trgl.trgl.multiplier import Multiplier
from ondevice_trgl.trgl.step import Tally


class ModuleRun:
    """Trains module `index`, which is loaded, in lap `lap`. `lowest`: the rung that it had to go down to before."""

    def __init__(
        self,
        context: Context,
        checkpointer: Checkpointer,
        lap: int,
        index: int,
        *,
        lowest: Rung | None,
        pressed: Pressed,
    ) -> None:
        self.context, self.checkpointer, self.lap, self.index = context, checkpointer, lap, index
        self._pressed = pressed
        self.module, head = context.partition.modules[index], context.heads[index]
        self.position = checkpointer.position(index)
        self.measured = dataclasses.replace(
            self.position.measured,
            params=parameter_count(self.module, head),
            frozen=self.module.frozen,
            passed=self.module.passed,
        )
        self._source: Source
        self._reached = self.position.epoch, self.position.step
        """Epochs that are behind the training, and steps of the next."""
        self.warm = context.warm_epochs(index, lap)
        self.multiplier = Multiplier.of(context.config, self.measured.multiplier if self.position.is_begun else None)
        if not self.position.is_begun:
            self.measured.best_epoch = self.measured.best_val = None
            self.measured.judged = 0
        self.best = Best(context.store, index, self.module, head)
        self.stepper = stepper_of(context, index, self.position, self.multiplier, lowest=lowest, pressed=pressed)
        if self.multiplier is not None:
            self.measured.multiplier = self.multiplier.value if self.stepper.objective.measures_transport else None

    def train(self) -> None:
        """All epochs that are left; none of a module that is frozen and has no head.

        Raises Paused, NonFiniteError, BudgetExceededError, StorageError.
        """
        if not self.stepper.optimizer.parameters:
            return
        self.stepper.objective.train_mode(True)
        device = self.context.device
        Randomness.of(self.context.store.load_extra(self.index, "run", torch.device("cpu"))).restore(device)
        self._judge_late()
        for epoch in range(self.position.epoch, self.warm + self.context.epochs(self.index)):
            if self._is_stalled(epoch):
                self.context.run.event("stalled", lap=self.lap, module=self.index, epoch=epoch)
                break
            if self.stepper.objective.warming != (epoch < self.warm):
                self.stepper.objective.warming = epoch < self.warm
                self.stepper.objective.train_mode(True)
            self._epoch(epoch, self.position.step if epoch == self.position.epoch else 0)
        self.measured.cache_read_bytes += self.context.boundaries.traffic()[0]

    def _epoch(self, epoch: int, done: int) -> None:
        """Epoch `epoch`, of which `done` steps are behind it."""
        progress, seed, batch = self.context.progress, self.context.config.seed, self.context.plan.batch_size
        self._source = self.context.boundaries.training(epoch)
        order = self.context.boundaries.order(epoch, self.context.config, self.lap, self.index)
        progress.start_epoch(epoch, done)
        if done:
            progress.tally = dataclasses.replace(self.position.tally)
        else:
            self.context.seed(mix(seed, self.lap, self.index, epoch, 1))
        progress.call("on_epoch_start")
        for start in range(done * batch, len(order) - batch + 1, batch):
            following = order[start + batch : start + 2 * batch]
            ahead(self._source, following)
            self._step(order[start : start + batch], following if len(following) == batch else [])
        measured, tally = self.measured, progress.tally
        measured.train_loss, measured.transport_cost = tally.mean_task_loss(), tally.mean_transport()
        self.note_peak()
        self.context.run.event(
            "epoch", lap=self.lap, module=self.index, epoch=epoch, task_loss=measured.train_loss,
            transport_cost=measured.transport_cost, train_accuracy=tally.accuracy(),
            peak_bytes=measured.measured_peak_bytes,
        )  # fmt: skip
        if self._is_judged(epoch):
            self._judge(epoch)
        progress.call("on_epoch_end")

    def _is_judged(self, epoch: int) -> bool:
        return self.context.config.patience is not None and epoch >= self.warm

    def _is_stalled(self, epoch: int) -> bool:
        """Whether, in front of `epoch`, the best is so many epochs behind as patience allows."""
        patience, best = self.context.config.patience, self.measured.best_epoch
        return patience is not None and best is not None and epoch > best + patience

    def _judge_late(self) -> None:
        """Validation behind an epoch at whose last step the run stopped."""
        epoch, progress = self.position.epoch - 1, self.context.progress
        if self.position.step or epoch < self.measured.judged or not self._is_judged(epoch):
            return
        progress.start_epoch(epoch, progress.steps)
        progress.tally = dataclasses.replace(self.position.tally)
        self._judge(epoch)

    def _judge(self, epoch: int) -> None:
        """Accuracy on the validation set, in eval mode; weights that are the best so far are kept on disk."""
        context, progress, measured = self.context, self.context.progress, self.measured
        started, place = self._clock(), (progress.phase, progress.phase_steps, progress.step)
        swept = self._sweep(write=False, splits=("val",))
        progress.phase, progress.phase_steps, progress.step = place
        self.stepper.objective.train_mode(True)
        accuracy = progress.val_accuracy = swept.accuracy["val"]
        measured.validation_seconds += self._clock() - started
        measured.judged = epoch + 1
        context.run.event("validation", lap=self.lap, module=self.index, epoch=epoch, val_accuracy=accuracy)
        if measured.best_val is None or accuracy > measured.best_val:
            measured.best_val, measured.best_epoch = accuracy, epoch
            context.budget.attempt(lambda: self.best.keep(epoch), f"keeping the best epoch of module {self.index}")
            self._checkpoint()  # a run that is resumed looks for what it kept, and not for what came later
            self.best.drop(but=epoch)

    def _step(self, indices: list[int], following: list[int]) -> None:
        progress = self.context.progress
        progress.call("on_step_start")
        self._follow_the_budget()
        source = self._source
        started = time.perf_counter()
        try:
            tally = self.stepper.step(source, indices, self._lr(), following=following)
        except NonFiniteError as error:
            buffer = self.stepper.buffer
            where = f"lap {self.lap}, module {self.index} ({progress.module_name})"
            raise located(error, progress, where, place(self.index, "train"), source, indices, buffer) from error
        except BudgetExceededError:
            self._checkpoint()
            raise
        self.measured.train_seconds += time.perf_counter() - started
        progress.tally.add(tally)
        progress.step += 1
        self._reached = progress.reached()
        self.measured.epochs_done += 1.0 / progress.steps
        if self.measured.multiplier is not None and progress.epoch >= self.warm:
            self._move(tally)
        progress.call("on_step_end")
        progress.rest()
        if (peak := self.note_peak()) > self.context.budget.bytes:
            self.stepper.overran(peak)
            self.context.meter.reset()
        if progress.pause.is_set():
            self._pause()
        if self.checkpointer.is_due():
            self._checkpoint()

    def _pause(self) -> NoReturn:
        """Stop here, with the training kept as it stands. Raises Paused."""
        if self.stepper.optimizer.parameters:
            self._checkpoint()
        epoch, step = self._reached
        self.context.run.event("pause", lap=self.lap, module=self.index, epoch=epoch, step=step)
        self.context.progress.call("on_pause")
        raise Paused

    def _sweep(self, *, write: bool, splits: Sequence[str] | None = None) -> Swept:
        """Every sample through the module, behind an epoch. Raises Paused, with the training kept as it stands."""
        buffer = self.stepper.buffer
        try:
            return self.context.sweep(self.index, self.stepper.objective, buffer, write=write, splits=splits)
        except Paused:
            self._pause()

    def _move(self, tally: Tally) -> None:
        """The multiplier, behind the step that `tally` is of."""
        assert self.multiplier is not None
        progress = self.context.progress
        self.multiplier.after(
            (progress.epoch - self.warm) * progress.steps + progress.step, tally.task_loss / tally.samples
        )
        self.measured.multiplier = self.multiplier.value

    def _checkpoint(self) -> None:
        """Save the module in mid-training."""
        progress, measured = self.context.progress, self.measured
        epoch, step = self._reached
        measured.train_loss, measured.transport_cost = progress.tally.mean_task_loss(), progress.tally.mean_transport()
        self.note_peak()
        read = measured.cache_read_bytes + self.context.boundaries.traffic()[0]
        position = Position(
            self.lap,
            epoch,
            step,
            dataclasses.replace(measured, cache_read_bytes=read),
            progress.tally,
            self.stepper.rung,
        )
        random = self.context.random_state() if step else {}
        self.checkpointer.save(self.index, position, optim=self.stepper.optimizer.state, run=random)

    def _follow_the_budget(self) -> None:
        """Let a smaller budget take effect."""
        budget = self.context.budget
        if not budget.has_changed(larger=False):
            return
        self.note_peak()
        if self.context.spill_cache(self.stepper.rung.peak_bytes):
            self._source = self.context.boundaries.training(self.context.progress.epoch)
            self._pressed(SPILLED, self.stepper.rung)
        budget.take()
        self.context.progress.budget_bytes = budget.bytes
        self.context.run.event("budget", lap=self.lap, module=self.index, budget_bytes=budget.bytes)
        self.stepper.fit()
        budget.begin()

    def finish(self) -> None:
        """Write the boundary behind the module, its accuracies and its last checkpoint."""
        context, measured, boundaries = self.context, self.measured, self.context.boundaries
        last = self.index == len(context.heads) - 1
        if measured.best_epoch is not None and measured.best_epoch + 1 < measured.judged:
            best = measured.best_epoch
            context.budget.attempt(lambda: self.best.bring_back(best), f"the best epoch of module {self.index}")
        started, (read, _) = self._clock(), boundaries.traffic()
        swept = self._sweep(write=not last)
        measured.cache_seconds += self._clock() - started
        measured.cache_write_bytes += boundaries.traffic()[1]
        if not last:
            measured.cache_dtype, measured.cache_error = boundaries.kept_as()
        measured.cache_read_bytes += boundaries.traffic()[0] - read
        measured.train_accuracy = context.progress.train_accuracy = swept.accuracy.get("train")
        measured.val_accuracy = context.progress.val_accuracy = swept.accuracy.get("val")
        measured.test_accuracy = swept.accuracy.get("test")
        measured.train_rmse, measured.val_rmse, measured.test_rmse = map(swept.rmse.get, SPLITS)
        self.note_peak()
        # at this rung's micro-batch the accuracies come out again
        position = Position(laps_done=self.lap + 1, measured=measured, rung=self.stepper.rung)
        keep = self.stepper.optimizer.state if self.lap + 1 < context.config.laps else {}
        self.checkpointer.save(self.index, position, optim=keep, run=swept.probabilities)
        self.best.drop()
        self.stepper.close()
        context.run.event("module_end", lap=self.lap, module=self.index, **vars(measured))
        context.progress.call("on_module_end")

    def _clock(self) -> float:
        """Seconds, those that were rested left out."""
        return time.perf_counter() - self.context.progress.rested()

    def note_peak(self) -> int:
        """Take the meter's peak, which is returned, into the module's figures and the run's."""
        peak, progress = self.context.budget.note_peak(), self.context.progress
        self.measured.measured_peak_bytes = max(self.measured.measured_peak_bytes, peak)
        progress.peak_bytes = max(progress.peak_bytes or 0, self.measured.measured_peak_bytes)
        return peak

    def _lr(self) -> float:
        progress = self.context.progress
        if progress.epoch < self.warm:
            return self.context.config.learning_rate
        done = (progress.epoch - self.warm) * progress.steps + progress.step
        return self.context.config.learning_rate_at(done / (self.context.epochs(self.index) * progress.steps))
