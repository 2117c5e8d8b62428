"""The run itself: for each lap, for each module: load, train on the boundary before it, write its own, evict."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.device.meter import PeakMeter
from ondevice_trgl.errors import NonFiniteError
from ondevice_trgl.model.partition import Partition
from ondevice_trgl.model.store import ModuleStore, evict
from ondevice_trgl.plan.planner import Plan
from ondevice_trgl.runtime.batches import buffer_for, check_finite, mix, place, shuffled, train_batches
from ondevice_trgl.runtime.boundaries import Boundaries
from ondevice_trgl.runtime.progress import Progress
from ondevice_trgl.runtime.run_dir import RunDir
from ondevice_trgl.runtime.sweep import Swept, sweep
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.trgl.step import Objective, Tally, train_step

CHECKPOINT_SECONDS = 60.0


class Paused(Exception):  # noqa: N818 -- no error: the way out of the loop after a requested pause
    """The run was asked to pause and has checkpointed."""


@dataclass
class Measured:
    """What one module did, over all laps; JSON-ready through `vars`."""

    params: int = 0
    measured_peak_bytes: int = 0
    train_seconds: float = 0.0
    cache_seconds: float = 0.0
    cache_read_bytes: int = 0
    cache_write_bytes: int = 0
    epochs_done: float = 0.0
    train_loss: float | None = None
    transport_cost: float | None = None
    train_accuracy: float | None = None
    val_accuracy: float | None = None
    test_accuracy: float | None = None


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
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    peak_outside: int = 0
    """Highest measured outside of every module's own time: set-up, and caching again after a resume."""
    _saved_at: float = field(default_factory=time.perf_counter)
    _saves: int = 0

    def restore_callbacks(self) -> None:
        """Give each callback the state that it had at the last checkpoint, where there is one."""
        positions = [self.store.position(k) for k in range(len(self.heads))]
        latest = max(positions, key=lambda position: int(position.get("saves", 0)))
        self._saves = latest.get("saves", 0)
        for callback, (name, state) in zip(self.progress.callbacks, latest.get("callbacks", []), strict=False):
            if name == type(callback).__qualname__ and state:
                callback.load_state_dict(state)

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
        return int(self.store.position(index)["laps_done"]) > lap

    def _reach(self, index: int) -> None:
        """Bring the boundary in front of module `index` back, where a resumed run lacks it."""
        while self.boundaries.index < index:
            before = self.boundaries.index
            self._load(before)
            objective = self._objective(before)
            self._sweep(before, objective, write=True)
            self._evict(before)
            self.boundaries.advance()

    def _module(self, lap: int, index: int) -> None:
        progress = self.progress
        progress.module, progress.module_name = index, self.partition.modules[index].label
        progress.enter("load", 0)
        self.peak_outside = max(self.peak_outside, self.meter.peak_bytes())
        self.meter.reset()
        position = self.store.position(index)
        measured = Measured(**position["measured"])
        self._load(index)
        objective = self._objective(index)
        optimizer = self._optimizer(objective)
        optimizer.load(self.store.load_extra(index, "optim", self.device))
        progress.train_accuracy = progress.val_accuracy = None
        progress.call("on_module_start")
        self.run.event("module_start", lap=lap, module=index, name=progress.module_name)
        self._train(lap, index, position, objective, optimizer, measured)
        last = index == len(self.heads) - 1
        started, (read, _) = time.perf_counter(), self.boundaries.traffic()
        swept = self._sweep(index, objective, write=not last)
        measured.cache_seconds += time.perf_counter() - started
        measured.cache_write_bytes += self.boundaries.traffic()[1]
        measured.cache_read_bytes += self.boundaries.traffic()[0] - read
        measured.train_accuracy = progress.train_accuracy = swept.accuracy.get("train")
        measured.val_accuracy = progress.val_accuracy = swept.accuracy.get("val")
        measured.test_accuracy = swept.accuracy.get("test")
        measured.measured_peak_bytes = max(measured.measured_peak_bytes, self.meter.peak_bytes())
        progress.peak_bytes = max(progress.peak_bytes or 0, measured.measured_peak_bytes)
        keep = optimizer.state if lap + 1 < self.config.laps else {}
        self._save(
            index, {"laps_done": lap + 1, "epoch": 0, "step": 0, "measured": vars(measured)}, keep, swept.probabilities
        )
        self.run.event("module_end", lap=lap, module=index, **vars(measured))
        progress.call("on_module_end")
        del objective, optimizer
        self._evict(index)
        if last:
            self.boundaries.rewind()
        else:
            self.boundaries.advance()

    def _objective(self, index: int) -> Objective:
        config = self.config
        return Objective(
            self.partition.modules[index],
            self.heads[index],
            tau=config.tau_value,
            transport=config.transport,
            transport_norm=config.transport_norm,
            label_smoothing=config.label_smoothing,
        )

    def _optimizer(self, objective: Objective) -> Optimizer:
        config = self.config
        return Optimizer(
            config.optimizer, objective.parameters(), momentum=config.momentum, weight_decay=config.weight_decay
        )

    def _train(
        self,
        lap: int,
        index: int,
        position: dict[str, Any],
        objective: Objective,
        optimizer: Optimizer,
        measured: Measured,
    ) -> None:
        config, plan, progress = self.config, self.plan, self.progress
        source = self.boundaries.source("train")
        module = self.partition.modules[index]
        buffer = self._buffer(index)
        objective.train_mode(True)
        if "rng" in (extra := self.store.load_extra(index, "run", torch.device("cpu"))):
            torch.set_rng_state(extra["rng"])
        for epoch in range(position["epoch"], config.epochs):
            done = position["step"] if epoch == position["epoch"] else 0
            order = shuffled(len(source.labels), config.seed, lap, index, epoch)
            if not done:
                torch.manual_seed(mix(config.seed, lap, index, epoch, 1))
            progress.start_epoch(epoch, done)
            if done:
                progress.tally = Tally(**position["tally"])
            progress.call("on_epoch_start")
            rest = order[done * plan.batch_size :]
            for micro_batches in train_batches(source, rest, plan.batch_size, buffer):
                progress.call("on_step_start")
                started = time.perf_counter()
                try:
                    moved = ((z.to(self.device), labels.to(self.device)) for z, labels in micro_batches)
                    tally = train_step(objective, optimizer, moved, plan.grad_accum_steps, self._lr())
                except NonFiniteError as error:
                    raise self._located(error, lap, index, order) from error
                measured.train_seconds += time.perf_counter() - started
                progress.tally.add(tally)
                progress.step += 1
                measured.epochs_done += 1.0 / progress.steps
                progress.call("on_step_end")
                self._checkpoint(lap, index, optimizer, measured)
            measured.train_loss, measured.transport_cost = (
                progress.tally.mean_task_loss(),
                progress.tally.mean_transport(),
            )
            measured.measured_peak_bytes = max(measured.measured_peak_bytes, self.meter.peak_bytes())
            progress.peak_bytes = max(progress.peak_bytes or 0, measured.measured_peak_bytes)
            self.run.event(
                "epoch", lap=lap, module=index, epoch=epoch, task_loss=measured.train_loss,
                transport_cost=measured.transport_cost, train_accuracy=progress.tally.accuracy(),
                peak_bytes=measured.measured_peak_bytes,
            )  # fmt: skip
            progress.call("on_epoch_end")
        measured.cache_read_bytes += self.boundaries.traffic()[0]
        del buffer, module

    def _lr(self) -> float:
        progress = self.progress
        return self.config.learning_rate_at(
            (progress.epoch * progress.steps + progress.step) / (progress.epochs * progress.steps)
        )

    def _checkpoint(self, lap: int, index: int, optimizer: Optimizer, measured: Measured) -> None:
        """Save the module in mid-training where a pause was asked for, or the last checkpoint is old."""
        pausing = self.progress.pause.is_set()
        if not pausing and time.perf_counter() - self._saved_at < self.checkpoint_seconds:
            return
        progress = self.progress
        epoch, step = (progress.epoch, progress.step) if progress.step < progress.steps else (progress.epoch + 1, 0)
        measured.train_loss, measured.transport_cost = progress.tally.mean_task_loss(), progress.tally.mean_transport()
        measured.measured_peak_bytes = max(measured.measured_peak_bytes, self.meter.peak_bytes())
        so_far = dataclasses.replace(
            measured, cache_read_bytes=measured.cache_read_bytes + self.boundaries.traffic()[0]
        )
        position = {
            "laps_done": lap, "epoch": epoch, "step": step, "measured": vars(so_far), "tally": vars(progress.tally),
        }  # fmt: skip
        self._save(index, position, optimizer.state, {"rng": torch.get_rng_state()} if step else {})
        if pausing:
            self.run.event("pause", lap=lap, module=index, epoch=epoch, step=step)
            progress.call("on_pause")
            raise Paused

    def _located(self, error: NonFiniteError, lap: int, index: int, order: list[int]) -> NonFiniteError:
        """`error` with the place, and the sample where the input itself is not finite."""
        progress, batch = self.progress, self.plan.batch_size
        indices = order[progress.step * batch : (progress.step + 1) * batch]
        source, micro = self.boundaries.source("train"), self._buffer(index)
        for start in range(0, len(indices), len(micro)):
            part = indices[start : start + len(micro)]
            source.read(part, micro)
            check_finite(micro, part, place(index, "train"))
        return NonFiniteError(
            f"{error.message} in lap {lap}, module {index} ({progress.module_name}), epoch {progress.epoch}, "
            f"step {progress.step}",
            hint="start again with a lower --lr or a larger --tau; the weights up to the last checkpoint are kept",
        )

    def _sweep(self, index: int, objective: Objective, *, write: bool) -> Swept:
        module = self.partition.modules[index]
        return sweep(objective, self._buffer(index), self.boundaries, self.progress, module, self.device, write=write)

    def _buffer(self, index: int) -> Tensor:
        chain = self.partition.chain
        dtype = chain.in_dtype if index == 0 else torch.float32
        return buffer_for(self.plan.micro_batch_size, self.partition.modules[index].in_shape, dtype)

    def _load(self, index: int) -> None:
        self.store.load(index, self.partition.modules[index], self.heads[index], self.device)

    def _save(self, index: int, position: dict[str, Any], optim: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
        self._saves += 1
        callbacks = [(type(callback).__qualname__, callback.state_dict()) for callback in self.progress.callbacks]
        position = {**position, "saves": self._saves, "callbacks": callbacks}
        self.store.save(index, self.partition.modules[index], self.heads[index], position, optim=optim, run=extra)
        self._saved_at = time.perf_counter()

    def _evict(self, index: int) -> None:
        evict(self.partition.modules[index], self.heads[index])
        release_memory()
