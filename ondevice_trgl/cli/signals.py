"""Ctrl-C and SIGTERM: the first asks for a checkpoint and a pause, the second stops at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from ondevice_trgl.run.callbacks import Callback, RunState

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal that is obeyed at once; not an Exception, so that nothing on its way takes it for an error."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class PauseOnSignal(Callback):
    """A callback that asks the run to pause after a signal, and the context in which signals are its own.

    Before training starts there is nothing to save: the first signal then raises Stopped.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._training = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "PauseOnSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses handlers
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        first, self.signum = self.signum is None, signum
        if not (first and self._training):
            raise Stopped(signum)
        # not print(): the signal may have interrupted a write to the same stream
        os.write(2, b"\nstopping after this step, with a checkpoint; once more to stop at once\n")

    def _poll(self, run: RunState) -> None:
        if self.signum is not None:
            run.request_pause()

    def on_fit_start(self, run: RunState) -> None:
        """From here on a signal means pause."""
        self._training = True

    def on_fit_end(self, run: RunState) -> None:
        """From here on a signal means stop."""
        self._training = False

    def on_pause(self, run: RunState) -> None:
        """The checkpoint stands: nothing is lost any more."""
        self._training = False

    on_lap_start = on_lap_end = on_module_start = on_module_end = _poll
    on_epoch_start = on_epoch_end = on_step_start = on_step_end = on_cache_write = _poll
