"""What a training shows while it runs, on stderr: plain lines, or a live display on a terminal."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from ondevice_trgl.report.table import format_seconds
from ondevice_trgl.run.callbacks import Callback, RunState
from ondevice_trgl.tasks import format_metric
from ondevice_trgl.units import format_size

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_FRAMES = 0.25


class Progress(Callback):
    """Shows nothing; the base of what does. A context, so that a display ends however the run ends."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; may be called twice."""


def place(run: RunState) -> str:
    """Where the run is: lap, module, phase, epoch."""
    lap = f"lap {run.lap + 1}/{run.laps}  " if run.laps > 1 else ""
    if run.together:
        return run.module_name
    return f"{lap}module {run.module + 1}/{run.num_modules} {run.module_name}"


def phase(run: RunState) -> str:
    """What it does there."""
    if run.phase == "train":
        return f"epoch {run.epoch + 1}/{run.epochs}"
    return {"load": "loading", "validate": "validating", "cache": "caching"}.get(run.phase, run.phase)


def losses(run: RunState) -> list[str]:
    """The loss in its two parts, and the accuracies, as far as they are known."""
    parts = [("task", run.task_loss, ".4f"), ("transport", run.transport_cost, ".3g")]
    figures = [f"{name} {value:{form}}" for name, value, form in parts if value is not None]
    return figures + accuracies(run)


def accuracies(run: RunState) -> list[str]:
    """Of the module in training, in the task's metric, as far as they are known."""
    parts = [("train", run.train_accuracy), ("val", run.val_accuracy)]
    return [f"{name} {format_metric(value, run.metric)}" for name, value in parts if value is not None]


def means(run: RunState) -> list[str]:
    """Memory, speed and time left, as far as they are known."""
    parts = [f"peak {peak_of(run)}"] if run.peak_bytes is not None else []
    if run.images_per_second is not None:
        parts.append(f"{run.images_per_second:.0f} images/s")
    if run.seconds_left is not None and run.seconds_left >= 1:
        parts.append(f"{format_seconds(run.seconds_left)} left")
    return parts


def peak_of(run: RunState) -> str:
    """The peak so far against the budget."""
    peak = "-" if run.peak_bytes is None else format_size(run.peak_bytes)
    return f"{peak} of {format_size(run.budget_bytes)}"


class PlainProgress(Progress):
    """A line a finished epoch and a finished module; in long epochs one every few seconds."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream: TextIO | None = stream
        self._clock = clock
        self._last = clock()

    def _print(self, *parts: str) -> None:
        self._last = self._clock()
        if self._stream is None:
            return
        try:
            print("  ".join(parts), file=self._stream, flush=True)
        except OSError:
            self._stream = None  # whoever read the lines has gone: no reason to end the training

    def _sometimes(self, run: RunState) -> None:
        if self._clock() - self._last >= SECONDS_BETWEEN_LINES:
            self._print(place(run), phase(run), f"{run.step}/{run.steps}", *losses(run), *means(run))

    on_step_end = on_cache_write = _sometimes

    def on_epoch_end(self, run: RunState) -> None:
        """A line an epoch."""
        self._print(place(run), phase(run), *losses(run), *means(run))

    def on_module_end(self, run: RunState) -> None:
        """A line a module."""
        self._print(place(run), "done", *losses(run), *means(run))

    def on_wait(self, run: RunState) -> None:
        """Why nothing goes on, and when it does."""
        self._print(place(run), f"waits: {run.waiting}" if run.waiting else "goes on")

    def on_pause(self, run: RunState) -> None:
        """Where the run can be taken up again."""
        self._print(f"paused; the checkpoint is in {run.run_dir}")
