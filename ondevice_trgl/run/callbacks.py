"""Hooks into a running training, and the read-only state that each is given."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ondevice_trgl.tasks import ACCURACY


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A snapshot of the run. Indices start at 0; losses and accuracies are of the module in training.

    `request_pause()` may be called from any hook and any thread: the run checkpoints after the current step.
    """

    run_dir: Path
    phase: str
    """load | train | validate | cache"""
    lap: int
    laps: int
    module: int
    num_modules: int
    module_name: str
    epoch: int
    epochs: int
    step: int
    """Optimizer steps done in this epoch; in the other phases, batches done."""
    steps: int
    """Optimizer steps in an epoch; in the other phases, batches to do."""
    task_loss: float | None
    """Mean over the samples of this epoch so far."""
    transport_cost: float | None
    images_per_second: float | None
    peak_bytes: int | None
    """Highest of the run so far, by the run's meter; None until the first module has been measured."""
    budget_bytes: int
    seconds_left: float | None
    """Estimate for the whole run; None until the first steps are timed."""
    train_accuracy: float | None = None
    """In the task's `metric`; while a module trains, of classes alone."""
    val_accuracy: float | None = None
    metric: str = ACCURACY
    """What the accuracies are figures of: accuracy, r2, f1, or pkg.module:callable."""
    together: bool = False
    """All modules make their steps side by side (parallel schedule): loss and accuracy are those of the last one."""
    waiting: str = ""
    """Why training waits for the device, in `on_wait`; "" when it goes on."""
    _pause: Callable[[], None] | None = None

    def request_pause(self) -> None:
        """Ask for a pause after the current step; the run can be resumed bit for bit."""
        if self._pause is not None:
            self._pause()


class Callback:
    """Override what you need; every hook does nothing by default.

    An exception raised in a hook stops the run, which stays resumable. A callback with state of its own overrides
    `state_dict` and `load_state_dict` with JSON-ready values; they go into every checkpoint.
    """

    def on_fit_start(self, run: RunState) -> None: ...
    def on_fit_end(self, run: RunState) -> None: ...
    def on_lap_start(self, run: RunState) -> None: ...
    def on_lap_end(self, run: RunState) -> None: ...
    def on_module_start(self, run: RunState) -> None: ...
    def on_module_end(self, run: RunState) -> None: ...
    def on_epoch_start(self, run: RunState) -> None: ...
    def on_epoch_end(self, run: RunState) -> None: ...
    def on_step_start(self, run: RunState) -> None: ...
    def on_step_end(self, run: RunState) -> None: ...

    def on_cache_write(self, run: RunState) -> None:
        """After each batch of boundary activations is written."""

    def on_budget_pressure(self, run: RunState) -> None:
        """After memory ran short, or the budget was lowered, and the module went on with less."""

    def on_wait(self, run: RunState) -> None:
        """When training waits for the device to cool down or to be charged, and when it goes on: see `run.waiting`."""

    def on_pause(self, run: RunState) -> None:
        """After the checkpoint of a requested pause."""

    def on_exception(self, run: RunState, error: BaseException) -> None:
        """Before an error leaves `fit`; the error goes on afterwards."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state to be kept in checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, on resume."""
