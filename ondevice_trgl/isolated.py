"""A fit in a process of its own, beside an app: its memory is gone afterwards, and a crash of it is not the app's.

The process has nothing of the app but what it is given, as pickled bytes through a pipe: model or callable, settings
and datasets. What these are of it imports anew, the app's main module as multiprocessing's spawn does. Hooks are called
here, in the thread that waits for the fit, and the other process waits for them. It ends by itself, with a checkpoint,
when this one is gone. Multiprocessing's own processes are not used: they leave one running, which counts.
"""

import contextlib
import dataclasses
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import spawn
from multiprocessing.connection import Connection, Pipe
from typing import Any

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import ProcessDiedError, TrglError, UsageError, from_record, to_record
from ondevice_trgl.policy import Stated
from ondevice_trgl.processes import LEAN
from ondevice_trgl.run.callbacks import Callback, RunState

_METHODS = [name for name in vars(Callback) if not name.startswith("__")]
_Order = tuple[int, str, Any]
"""Its number, what is asked for, and a value."""
_ASK = "ask"
"""As a budget: whoever waits is asked for it, each time."""


class Isolated:
    """One fit in another process, seen from here."""

    def __init__(self, config: TrainConfig, callbacks: Sequence[Callback]) -> None:
        self._config, self._callbacks = config, callbacks
        self._budget = config.budget
        self._control: Connection | None = None
        self._lock = threading.Lock()
        self._training = self._changed = self._early = False
        self._given = 0
        self._orders: list[_Order] = []
        """Given since the last answer, which takes them along: what a hook asks for holds when it returns."""

    def pause(self) -> None:
        """Checkpoint after the first step that is done from now on, and end. From any thread."""
        self._early = True
        self._send("pause", None)

    def set_budget(self, budget: Stated) -> None:
        """Change the budget, as soon as something trains. From any thread."""
        self._budget, self._changed = budget, True
        if self._training:
            self._send("budget", _ASK if callable(budget) else budget)

    def _send(self, what: str, value: Any) -> None:
        with self._lock, contextlib.suppress(OSError):  # it may have ended this moment
            self._given += 1
            order = self._given, what, value
            self._orders.append(order)
            if self._control is not None:
                self._control.send(order)

    def fit(self, trainer: type, arguments: dict[str, Any], sets: Sequence[Any], *, resume: bool) -> None:
        """`trainer(**arguments).fit(*sets)` there. Raises what it raises: TrglError, and what a hook here raised.

        Raises UsageError for what cannot be pickled, ProcessDiedError where the process died; the run can be resumed.
        """
        config = dataclasses.replace(self._config, budget=None) if callable(self._budget) else self._config
        asks = callable(self._budget)
        kinds = [(type(one).__qualname__, _overridden(type(one))) for one in self._callbacks]
        work = _pickled(trainer, {**arguments, "config": config}, tuple(sets), resume, asks, kinds)
        here, there = Pipe()
        heard, control = Pipe(duplex=False)
        files = there.fileno(), heard.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", LEAN, "ondevice_trgl.isolated", *map(str, files)],
            pass_fds=files,
            stdin=subprocess.DEVNULL,
        )
        self._control = control
        try:
            there.close()
            heard.close()
            self._answer(here, process, (_preparation(), work))
        finally:
            self._training = False
            with self._lock:
                self._control = None
            control.close()
            if process.poll() is None:  # a hook failed here
                process.terminate()
            process.wait()
            here.close()

    def _answer(self, talk: Connection, process: "subprocess.Popen[bytes]", given: Sequence[bytes]) -> None:
        """Hand over what is given, then do what the other process asks for, until it is done."""
        try:
            for part in given:
                talk.send_bytes(part)
            while (message := talk.recv())[0] not in ("done", "error"):
                try:
                    answer = self._done(message[0], message[1:])
                except (EOFError, OSError) as error:
                    raise _HookError(error) from error
                with self._lock:
                    orders, self._orders = self._orders, []
                talk.send((answer, orders))
        except _HookError as error:
            raise error.own from None
        except (EOFError, OSError):
            raise _died(process.wait()) from None
        process.wait()
        if message[0] == "error":
            raise from_record(message[1])

    def _done(self, what: str, values: Sequence[Any]) -> Any:
        if what == "started":
            self._training = True
            if self._changed:
                self.set_budget(self._budget or 0)
            if self._early:
                self.pause()
            return None
        if what == "budget":
            assert callable(self._budget)
            return self._budget()
        number, name, *given = values
        if name.startswith("on_"):
            state = RunState(**given[0], _pause=self.pause)
            given = [state, *given[1:]]
        return getattr(self._callbacks[number], name)(*given)


class _HookError(Exception):
    """What a hook raised, which is not the connection's."""

    def __init__(self, own: Exception) -> None:
        self.own = own


def _overridden(kind: type[Callback]) -> list[str]:
    return [name for name in _METHODS if getattr(kind, name) is not getattr(Callback, name)]


def _preparation() -> bytes:
    """Where a process finds what this one has imported."""
    own = spawn.get_preparation_data("trgl-fit")
    del own["authkey"]  # a secret, which it has no use for
    return pickle.dumps(own)


def _pickled(*work: Any) -> bytes:
    try:
        return pickle.dumps(work)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"isolate: what the fit works with cannot be given to another process: {error}",
            hint="classes and functions of a module's top level can; none that are defined inside a function",
        ) from error


def _died(code: int) -> ProcessDiedError:
    status = f"with status {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            status = f"by {signal.Signals(-code).name}"
    hints = {-signal.SIGKILL: "killed for want of memory, most likely; "}
    return ProcessDiedError(
        f"the process of the fit ended {status}",
        returncode=code,
        hint=f"{hints.get(code, '')}fit(resume=True) goes on from the last checkpoint",
    )


class _Line:
    """To the process that waits. One question at a time, from whatever thread."""

    def __init__(self, talk: Connection) -> None:
        self._talk, self._lock = talk, threading.Lock()
        self._obeyed, self._one_by_one = 0, threading.RLock()
        self.obey: Callable[[str, Any], None] = lambda what, value: None

    def ask(self, *what: Any) -> Any:
        with self._lock:
            self._talk.send(what)
            answer, orders = self._talk.recv()
        for order in orders:
            self.take(order)
        return answer

    def take(self, order: _Order) -> None:
        """Obey, once: an order comes on two ways, and the later one may be an old one's."""
        number, what, value = order
        with self._one_by_one:
            if number > self._obeyed:
                self._obeyed = number
                self.obey(what, value)

    def say(self, *what: Any) -> None:
        """The last word, whether somebody is there or not."""
        with self._lock, contextlib.suppress(OSError):
            self._talk.send(what)


def _proxy(line: _Line, number: int, name: str, methods: Sequence[str]) -> Callback:
    """A callback that is another process's, number `number` there.

    `name` is that of its class, as checkpoints know it, `methods` are those of its own.
    """

    def hook(method: str) -> Callable[..., Any]:
        def call(self: Callback, *given: Any) -> Any:
            try:
                return line.ask("call", number, method, *map(_plain, given))
            except (EOFError, OSError):
                if method.startswith("on_"):
                    return None  # nobody is there any more, and a pause is on its way
                raise  # without its state no checkpoint is whole: the last one holds

        return call

    made: Callback = type("Proxy", (Callback,), {**{m: hook(m) for m in methods}, "__qualname__": name})()
    return made


def _plain(value: Any) -> Any:
    """What crosses: of a state its values, of an error its words."""
    if isinstance(value, RunState):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name != "_pause"}
    if isinstance(value, TrglError):
        return from_record(to_record(value))
    return TrglError(f"{type(value).__name__}: {value}") if isinstance(value, BaseException) else value


class _Started(Callback):
    """Says so, and is told what was asked for before."""

    def __init__(self, line: _Line) -> None:
        self._line = line

    def on_fit_start(self, run: RunState) -> None:
        self._line.ask("started")


def main(talk: Connection, control: Connection) -> None:
    """That of the other process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the app, which says what is to be done
    spawn.prepare(pickle.loads(talk.recv_bytes()))
    work = talk.recv_bytes()
    line = _Line(talk)
    try:
        trainer, arguments, sets, resume, asks, kinds = pickle.loads(work)
        if asks:
            config = arguments["config"]
            arguments["config"] = dataclasses.replace(config, budget=lambda: line.ask("budget"))
        proxies = [_proxy(line, number, *kind) for number, kind in enumerate(kinds)]
        fitting = trainer(**arguments, callbacks=[*proxies, _Started(line)])
        line.obey = partial(_obey, fitting, line)
        threading.Thread(target=_listen, args=(control, line), name="trgl-control", daemon=True).start()
        fitting.fit(*sets, resume=resume)
    except TrglError as error:
        line.say("error", to_record(error))
    except (EOFError, BrokenPipeError, ConnectionError):
        return  # whoever waited is gone
    except Exception as error:
        line.say("error", to_record(TrglError(f"{type(error).__name__}: {error}")))
    else:
        line.say("done")


def _obey(fitting: Any, line: _Line, what: str, value: Any) -> None:
    if what == "budget":
        with contextlib.suppress(UsageError):  # it ended this moment
            fitting.set_budget((lambda: line.ask("budget")) if value == _ASK else value)
    else:
        fitting.request_pause()


def _listen(control: Connection, line: _Line) -> None:
    for order in _orders(control):
        line.take(order)


def _orders(control: Connection) -> Iterator[_Order]:
    """What is asked for from outside; a pause where nobody is there any more."""
    try:
        while True:
            yield control.recv()
    except (EOFError, OSError):
        yield sys.maxsize, "pause", None


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), Connection(int(sys.argv[2]), writable=False))
