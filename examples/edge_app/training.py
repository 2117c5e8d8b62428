"""Training in a thread of the app: started, paused and told its budget by other threads."""

import contextlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.edge_app.frames import Classifier, Foreground
from examples.edge_app.network import TEST, TRAIN, VAL, Digits, make_network
from ondevice_trgl import Callback, RunState, TrainConfig, Trainer

AT_WORK = ("planning", "training", "yielding", "pausing")
"""States in which the thread is alive; the others are idle, paused, completed and failed."""


class ConflictError(Exception):
    """What was asked for does not go with what is going on."""


class BackgroundTrainer(Callback):
    """Trains the app's network in `folder`; a run that is there is gone on with.

    While the foreground is busy the run is paused, with its checkpoint on disk and its memory given back.
    """

    def __init__(
        self,
        folder: Path,
        budget: str | int,
        settings: Mapping[str, Any],
        classifier: Classifier,
        foreground: Foreground,
    ) -> None:
        TrainConfig(budget=budget, **settings)  # what is wrong with them is said now
        self._folder, self._budget, self._settings = folder, budget, settings
        self._classifier, self._foreground = classifier, foreground
        self._changed = threading.Condition()
        self._wanted = self._closed = False
        self._state = self._found()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._run: RunState | None = None
        self._peak_bytes: int | None = None
        self._test_accuracy: float | None = None

    # called by any thread

    def start(self) -> None:
        """Begin, or go on. Returns when training has started, or raises why it cannot: TrglError, ConflictError."""
        with self._changed:
            if self._closed:
                raise ConflictError("the app is being stopped")
            if self._state in AT_WORK:
                raise ConflictError(f"training was started already, and is {self._state}")
            self._wanted, self._state, self._error = True, "planning", None
            self._thread = threading.Thread(target=self._work, name="trainer")
            self._thread.start()
            self._changed.wait_for(lambda: self._state != "planning")
            if self._error is not None:
                raise self._error

    def pause(self) -> None:
        """Returns when the checkpoint is on disk. Raises ConflictError where nothing is training."""
        with self._changed:
            thread = self._thread
            if thread is None or self._state not in AT_WORK:
                raise ConflictError(f"nothing is training: the state is {self._state}")
            self._wanted, self._state = False, "pausing"
            self._changed.notify_all()
        thread.join()

    def wait(self) -> None:
        """Until what was started has ended, however it ends."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Pause where something is training, and let nothing be started any more."""
        with self._changed:
            self._closed = True
        with contextlib.suppress(ConflictError):
            self.pause()

    def set_budget(self, budget: str | int) -> None:
        """What holds from the next step, or the next start. Raises ConfigError."""
        TrainConfig(budget=budget)
        self._budget = budget

    def status(self) -> dict[str, Any]:
        """All that there is to say, JSON-ready."""
        with self._changed:
            run, error = self._run, self._error
            said: dict[str, Any] = {
                "state": self._state,
                "budget": self._budget,
                "peak_bytes": self._peak_bytes,
                "test_accuracy": self._test_accuracy,
                "error": None if error is None else {"error": type(error).__name__, "message": str(error)},
            }
        if run is not None:
            names = ("phase", "module", "num_modules", "epoch", "epochs", "budget_bytes", "seconds_left")
            said["progress"] = {name: getattr(run, name) for name in names}
        return said

    # the thread's own

    def _work(self) -> None:
        outcome: str = "paused"
        try:
            while self._waited_until_quiet():
                trainer = Trainer(
                    make_network,
                    # asked between steps, so that a new budget needs no more than to be remembered
                    TrainConfig(budget=lambda: self._budget, **self._settings),
                    run_dir=self._folder,
                    callbacks=[self],
                )
                sets = [Digits(rows) for rows in (TRAIN, VAL, TEST)]
                report = trainer.fit(*sets, resume="auto")
                self._peak_bytes = report.measured_peak_bytes
                if report.status == "completed":
                    self._test_accuracy = report.accuracy.test
                    self._classifier.use(trainer.export(head="best"))
                    outcome = "completed"
                    break
        except Exception as error:  # the app goes on without training, and says why
            outcome, self._error = "failed", error
        self._turn(outcome)

    def _waited_until_quiet(self) -> bool:
        """Wait while the foreground is busy; whether training is still wanted then."""
        with self._changed:
            while self._wanted and (seconds := self._foreground.seconds_left()):
                self._state = "yielding"
                self._changed.notify_all()
                self._changed.wait(seconds)
            if not self._wanted:
                return False
            self._state = "planning"
            self._changed.notify_all()
            return True

    def _turn(self, state: str) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()

    def _has_run(self) -> bool:
        return (self._folder / "config.json").is_file()

    def _found(self) -> str:
        """How an earlier process left the run; one that was killed left it as if it had been paused."""
        if not self._has_run():
            return "idle"
        try:
            report = json.loads((self._folder / "report.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return "paused"
        return "completed" if report["status"] == "completed" else "paused"

    # hooks, called by fit in that thread

    def on_fit_start(self, run: RunState) -> None:
        """Planned, and about to train."""
        with self._changed:
            self._run = run
            if self._state == "planning":
                self._state = "training"
                self._changed.notify_all()

    def _look(self, run: RunState) -> None:
        self._run, self._peak_bytes = run, run.peak_bytes or self._peak_bytes
        if not self._wanted or self._foreground.seconds_left():
            run.request_pause()

    on_step_end = on_epoch_end = on_module_end = on_cache_write = _look
