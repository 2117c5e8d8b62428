"""Where the run stands: one mutable place, snapshots of which go to the callbacks."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ondevice_trgl.run.callbacks import Callback, RunState
from ondevice_trgl.tasks import ACCURACY
from ondevice_trgl.trgl.step import Tally


@dataclass
class Progress:
    """Counts what is done, times it, and calls the hooks."""

    run_dir: Path
    budget_bytes: int
    laps: int
    num_modules: int
    lengths: Sequence[float]
    """Of what is trained one after another in a lap, against each other."""
    steps: int
    callbacks: Sequence[Callback]
    metric: str = ACCURACY
    stage: int = 0
    together: bool = False
    """Whether all modules make their steps side by side at present (parallel schedule)."""
    lap: int = 0
    module: int = 0
    module_name: str = ""
    module_epochs: int = 1
    """Of this module, which may be others than those of most."""
    epoch: int = 0
    step: int = 0
    phase: str = "load"
    phase_steps: int = 0
    peak_bytes: int | None = None
    train_accuracy: float | None = None
    val_accuracy: float | None = None
    tally: Tally = field(default_factory=Tally)
    pause: threading.Event = field(default_factory=threading.Event)
    rest: Callable[[], None] = lambda: None
    """To be called between two steps, or batches; see `Conditions`."""
    rested: Callable[[], float] = lambda: 0.0
    """Seconds that were rested so far."""
    waiting: str = ""
    """Why training waits at present."""
    _started: float = field(default_factory=time.perf_counter)
    _first_step: float | None = None
    _mark: tuple[float, int] | None = None

    def enter(self, phase: str, steps: int) -> None:
        self.phase, self.phase_steps, self.step = phase, steps, 0
        self._mark = None

    def start_epoch(self, epoch: int, step: int) -> None:
        self.enter("train", self.steps)
        self.epoch, self.step, self.tally = epoch, step, Tally()

    def reached(self) -> tuple[int, int]:
        """Epochs that are behind the training, and steps of the next: what a checkpoint holds."""
        return (self.epoch, self.step) if self.step < self.steps else (self.epoch + 1, 0)

    def call(self, hook: str, *extra: object) -> None:
        """Call `hook` of every callback with a snapshot."""
        if self.callbacks:
            state = self.state()
            for callback in self.callbacks:
                getattr(callback, hook)(state, *extra)

    def state(self) -> RunState:
        training = self.phase == "train"
        return RunState(
            run_dir=self.run_dir,
            phase=self.phase,
            lap=self.lap,
            laps=self.laps,
            module=self.module,
            num_modules=self.num_modules,
            module_name=self.module_name,
            together=self.together,
            epoch=self.epoch,
            epochs=self.module_epochs,
            step=self.step,
            steps=self.phase_steps,
            task_loss=self.tally.mean_task_loss(),
            transport_cost=self.tally.mean_transport(),
            images_per_second=self._speed() if training else None,
            peak_bytes=self.peak_bytes,
            budget_bytes=self.budget_bytes,
            seconds_left=self._seconds_left(),
            train_accuracy=self.train_accuracy if self.train_accuracy is not None else self.tally.accuracy(),
            val_accuracy=self.val_accuracy,
            metric=self.metric,
            waiting=self.waiting,
            _pause=self.pause.set,
        )

    def _speed(self) -> float | None:
        """Samples a second since the first step of this epoch, which is left out as a warm-up."""
        now = time.perf_counter()
        if self._mark is None:
            self._mark = now, self.tally.samples
            return None
        then, samples = self._mark
        return (self.tally.samples - samples) / (now - then) if now > then else None

    def _seconds_left(self) -> float | None:
        own = self.epoch * self.steps
        own += self.step if self.phase == "train" else self.steps if self.phase in ("validate", "cache") else 0
        lap, before = sum(self.lengths), sum(self.lengths[: self.stage])
        done = (self.lap * lap + before) * self.steps + own * self.lengths[self.stage] / self.module_epochs
        total = self.laps * lap * self.steps
        if self._first_step is None:
            self._first_step, self._started = done, time.perf_counter()
            return None
        if done <= self._first_step:
            return None
        return (time.perf_counter() - self._started) * (total - done) / (done - self._first_step)
