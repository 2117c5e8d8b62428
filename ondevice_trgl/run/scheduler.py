"""The run itself: for each lap, for each module: load, train on the boundary before it, write its own, evict."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.device.meter import PeakMeter
from ondevice_trgl.errors import BudgetExceededError, NonFiniteError
from ondevice_trgl.model.partition import Partition
from ondevice_trgl.model.store import ModuleStore, evict, parameter_count
from ondevice_trgl.plan.plan import Plan, Rung, rung_within
from ondevice_trgl.run.batches import buffer_for, check_finite, mix, place, shuffled
from ondevice_trgl.run.boundaries import Boundaries
from ondevice_trgl.run.budget import Budget
from ondevice_trgl.run.measured import Measured, Paused
from ondevice_trgl.run.position import Position
from ondevice_trgl.run.progress import Progress
from ondevice_trgl.run.run_dir import RunDir
from ondevice_trgl.run.stepper import Pressure, Stepper
from ondevice_trgl.run.sweep import Swept, sweep
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.trgl.step import Objective

CHECKPOINT_SECONDS = 60.0


@dataclass
class Scheduler:
    """Runs a Partition under a Plan. Everything it needs is handed in; everything it learns is in the store."""

    partition: Partition
    heads: Sequence[nn.Module | None]
    plan: Plan
    config: TrainConfig
    store: ModuleStore
    run: RunDir
    boundaries: Boundaries
    progress: Progress
    meter: PeakMeter
    device: torch.device
    budget: Budget
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    peak_outside: int = 0
    """Highest measured outside of every module's own time: set-up, and caching again after a resume."""
    pressures: list[dict[str, Any]] = field(default_factory=list)
    """Every time that memory ran short: where, why, and what was done."""
    _lowest: dict[int, Rung] = field(default_factory=dict)
    """Rungs that modules had to go down to."""
    _saved_at: float = field(default_factory=time.perf_counter)
    _saves: int = 0

    def restore_callbacks(self) -> None:
        """Give each callback the state that it had at the last checkpoint, where there is one."""
        latest = max(map(self._position, range(len(self.heads))), key=lambda position: position.saves)
        self._saves = latest.saves
        for callback, (name, state) in zip(self.progress.callbacks, latest.callbacks, strict=False):
            if name == type(callback).__qualname__ and state:
                callback.load_state_dict(dict(state))

    def fit(self) -> None:
        """Train from wherever the store says that the run stands. Raises Paused after a requested pause."""
        for lap in range(self.config.laps):
            self.progress.lap = lap
            if self._done(lap, len(self.heads) - 1):
                continue
            self.progress.call("on_lap_start")
            self.boundaries.rewind()
            for index in range(len(self.heads)):
                if not self._done(lap, index):
                    self._reach(index)
                    self._module(lap, index)
            self.progress.call("on_lap_end")

    def _done(self, lap: int, index: int) -> bool:
        return self._position(index).laps_done > lap

    def _position(self, index: int) -> Position:
        return Position.from_dict(self.store.position(index))

    def _reach(self, index: int) -> None:
        """Bring the boundary in front of module `index` back, where a resumed run lacks it."""
        while self.boundaries.index < index:
            before = self.boundaries.index
            self._load(before)
            rung = rung_within(self.plan.ladders[before], self.budget.bytes)
            self._sweep(before, self._objective(before, rung), self._buffer(before, rung), write=True)
            self._evict(before)
            self.boundaries.advance()

    def _module(self, lap: int, index: int) -> None:
        progress = self.progress
        progress.module, progress.module_name = index, self.partition.modules[index].label
        progress.enter("load", 0)
        self.peak_outside = max(self.peak_outside, self.budget.note_peak())
        self.budget.take(larger=True)
        progress.budget_bytes = self.budget.bytes
        self.meter.reset()
        position = self._position(index)
        measured = dataclasses.replace(
            position.measured, params=parameter_count(self.partition.modules[index], self.heads[index])
        )
        self.budget.make_room()
        self._load(index)
        progress.train_accuracy = progress.val_accuracy = None
        progress.call("on_module_start")
        self.run.event("module_start", lap=lap, module=index, name=progress.module_name)
        stepper = self._stepper(lap, index, position)
        self._train(lap, index, position, stepper, measured)
        last = index == len(self.heads) - 1
        started, (read, _) = time.perf_counter(), self.boundaries.traffic()
        swept = self._sweep(index, stepper.objective, stepper.buffer, write=not last)
        measured.cache_seconds += time.perf_counter() - started
        measured.cache_write_bytes += self.boundaries.traffic()[1]
        measured.cache_read_bytes += self.boundaries.traffic()[0] - read
        measured.train_accuracy = progress.train_accuracy = swept.accuracy.get("train")
        measured.val_accuracy = progress.val_accuracy = swept.accuracy.get("val")
        measured.test_accuracy = swept.accuracy.get("test")
        self._note_peak(measured)
        keep = stepper.optimizer.state if lap + 1 < self.config.laps else {}
        # at this rung's micro-batch the accuracies come out again
        position = Position(laps_done=lap + 1, measured=measured, rung=stepper.rung)
        self._save(index, position, keep, swept.probabilities)
        self.run.event("module_end", lap=lap, module=index, **vars(measured))
        progress.call("on_module_end")
        del stepper
        self._evict(index)
        if last:
            self.boundaries.rewind()
        else:
            self.boundaries.advance()

    def _stepper(self, lap: int, index: int, position: Position) -> Stepper:
        """The module as it stands at `position`, on the highest rung that the budget allows, or where it was."""
        ladder, module, config = self.plan.ladders[index], self.partition.modules[index], self.config
        rung = rung_within(ladder, self.budget.bytes)
        for lower in (self._lowest.get(index), position.rung if position.epoch or position.step else None):
            if lower in ladder:
                rung = ladder[max(ladder.index(rung), ladder.index(lower))]
        optimizer = Optimizer(
            config.optimizer,
            self._objective(index, rung).parameters(),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        optimizer.load(
            self.budget.attempt(
                lambda: self.store.load_extra(index, "optim", self.device), f"optimizer state of module {index}"
            )
        )
        return Stepper(
            partial(self._objective, index),
            optimizer,
            ladder,
            rung,
            batch_size=self.plan.batch_size,
            in_shape=module.in_shape,
            in_dtype=self._dtype(index),
            device=self.device,
            budget=self.budget,
            notify=partial(self._pressed, lap, index),
        )

    def _pressed(self, lap: int, index: int, pressure: Pressure, rung: Rung) -> None:
        progress = self.progress
        place = {"lap": lap, "module": index, "epoch": progress.epoch, "step": progress.step}
        self._lowest[index] = rung
        self.pressures.append({**place, **vars(pressure)})
        self.run.event("pressure", **place, **vars(pressure))
        progress.call("on_budget_pressure")

    def _objective(self, index: int, rung: Rung) -> Objective:
        config = self.config
        return Objective(
            self.partition.modules[index],
            self.heads[index],
            tau=config.tau_value,
            transport=config.transport,
            transport_norm=config.transport_norm,
            label_smoothing=config.label_smoothing,
            pieces=self.partition.pieces(index) if rung.checkpointed else (),
        )

    def _train(self, lap: int, index: int, position: Position, stepper: Stepper, measured: Measured) -> None:
        config, plan, progress = self.config, self.plan, self.progress
        source = self.boundaries.source("train")
        stepper.objective.train_mode(True)
        if "rng" in (extra := self.store.load_extra(index, "run", torch.device("cpu"))):
            torch.set_rng_state(extra["rng"])
        for epoch in range(position.epoch, config.epochs):
            done = position.step if epoch == position.epoch else 0
            order = shuffled(len(source.labels), config.seed, lap, index, epoch)
            if not done:
                torch.manual_seed(mix(config.seed, lap, index, epoch, 1))
            progress.start_epoch(epoch, done)
            if done:
                progress.tally = dataclasses.replace(position.tally)
            progress.call("on_epoch_start")
            for start in range(done * plan.batch_size, len(order) - plan.batch_size + 1, plan.batch_size):
                progress.call("on_step_start")
                self._follow_the_budget(lap, index, stepper, measured)
                started = time.perf_counter()
                try:
                    tally = stepper.step(source, order[start : start + plan.batch_size], self._lr())
                except NonFiniteError as error:
                    raise self._located(error, lap, index, order, stepper.buffer) from error
                except BudgetExceededError:
                    self._checkpoint(lap, index, stepper, measured, now=True)
                    raise
                measured.train_seconds += time.perf_counter() - started
                progress.tally.add(tally)
                progress.step += 1
                measured.epochs_done += 1.0 / progress.steps
                progress.call("on_step_end")
                self._checkpoint(lap, index, stepper, measured)
            measured.train_loss, measured.transport_cost = (
                progress.tally.mean_task_loss(),
                progress.tally.mean_transport(),
            )
            self._note_peak(measured)
            self.run.event(
                "epoch", lap=lap, module=index, epoch=epoch, task_loss=measured.train_loss,
                transport_cost=measured.transport_cost, train_accuracy=progress.tally.accuracy(),
                peak_bytes=measured.measured_peak_bytes,
            )  # fmt: skip
            progress.call("on_epoch_end")
        measured.cache_read_bytes += self.boundaries.traffic()[0]

    def _follow_the_budget(self, lap: int, index: int, stepper: Stepper, measured: Measured) -> None:
        """Let a smaller budget that was asked for take effect."""
        if not self.budget.is_asked:
            return
        self._note_peak(measured)
        if self.budget.take(larger=False):
            self.progress.budget_bytes = self.budget.bytes
            self.run.event("budget", lap=lap, module=index, budget_bytes=self.budget.bytes)
            stepper.fit()

    def _note_peak(self, measured: Measured) -> None:
        measured.measured_peak_bytes = max(measured.measured_peak_bytes, self.budget.note_peak())
        self.progress.peak_bytes = max(self.progress.peak_bytes or 0, measured.measured_peak_bytes)

    def _lr(self) -> float:
        progress = self.progress
        return self.config.learning_rate_at(
            (progress.epoch * progress.steps + progress.step) / (progress.epochs * progress.steps)
        )

    def _checkpoint(self, lap: int, index: int, stepper: Stepper, measured: Measured, *, now: bool = False) -> None:
        """Save the module in mid-training where a pause was asked for, the last checkpoint is old, or with `now`."""
        pausing = self.progress.pause.is_set() and not now
        if not (now or pausing) and time.perf_counter() - self._saved_at < self.checkpoint_seconds:
            return
        progress = self.progress
        epoch, step = (progress.epoch, progress.step) if progress.step < progress.steps else (progress.epoch + 1, 0)
        measured.train_loss, measured.transport_cost = progress.tally.mean_task_loss(), progress.tally.mean_transport()
        self._note_peak(measured)
        so_far = dataclasses.replace(
            measured, cache_read_bytes=measured.cache_read_bytes + self.boundaries.traffic()[0]
        )
        position = Position(lap, epoch, step, so_far, progress.tally, stepper.rung)
        self._save(index, position, stepper.optimizer.state, {"rng": torch.get_rng_state()} if step else {})
        if pausing:
            self.run.event("pause", lap=lap, module=index, epoch=epoch, step=step)
            progress.call("on_pause")
            raise Paused

    def _located(self, error: NonFiniteError, lap: int, index: int, order: list[int], buffer: Tensor) -> NonFiniteError:
        """`error` with the place, and the sample where the input itself is not finite."""
        progress, batch = self.progress, self.plan.batch_size
        indices = order[progress.step * batch : (progress.step + 1) * batch]
        source = self.boundaries.source("train")
        for start in range(0, len(indices), len(buffer)):
            part = indices[start : start + len(buffer)]
            source.read(part, buffer)
            check_finite(buffer, part, place(index, "train"))
        return NonFiniteError(
            f"{error.message} in lap {lap}, module {index} ({progress.module_name}), epoch {progress.epoch}, "
            f"step {progress.step}",
            hint="start again with a lower --lr or a larger --tau; the weights up to the last checkpoint are kept",
        )

    def _sweep(self, index: int, objective: Objective, buffer: Tensor, *, write: bool) -> Swept:
        module = self.partition.modules[index]
        return sweep(objective, buffer, self.boundaries, self.progress, module, self.device, self.budget, write=write)

    def _buffer(self, index: int, rung: Rung) -> Tensor:
        return buffer_for(rung.micro_batch_size, self.partition.modules[index].in_shape, self._dtype(index))

    def _dtype(self, index: int) -> torch.dtype:
        return self.partition.chain.in_dtype if index == 0 else torch.float32

    def _load(self, index: int) -> None:
        self.budget.attempt(
            lambda: self.store.load(index, self.partition.modules[index], self.heads[index], self.device),
            f"loading module {index}",
        )

    def _save(self, index: int, position: Position, optim: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
        self._saves += 1
        callbacks = tuple((type(callback).__qualname__, callback.state_dict()) for callback in self.progress.callbacks)
        values = dataclasses.replace(position, saves=self._saves, callbacks=callbacks).to_dict()
        self.budget.attempt(
            lambda: self.store.save(
                index, self.partition.modules[index], self.heads[index], values, optim=optim, run=extra
            ),
            f"the checkpoint of module {index}",
        )
        self._saved_at = time.perf_counter()

    def _evict(self, index: int) -> None:
        evict(self.partition.modules[index], self.heads[index])
        release_memory()
