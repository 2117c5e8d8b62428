"""Short-lived processes of our own: ask one something, and what its imports and tensors took is gone with it.

Each request has a name; the module behind it is run as `python -m` would, in a lean process, reads one JSON request on
stdin and prints one JSON answer.
"""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from ondevice_trgl.errors import ProcessDiedError, TrglError, from_record, to_record

REQUESTS = {
    "prepare": "ondevice_trgl.data.prepare_child",
    "stage": "ondevice_trgl.setup.staging",
    "plan": "ondevice_trgl.setup.planning",
    "baseline": "ondevice_trgl.baseline",
    "train": "ondevice_trgl.jobs",
}
"""What can be asked, and of which module; nothing else is ever run."""
LEAN = "ondevice_trgl.device.lean"
CALLER = "TRGL_CALLER"
"""In the environment of a lean process: whose it is. It ends with that one."""

_TELLING = "\x1d"
"""Begins a line on stderr that is for whoever asked."""

Ask = Callable[..., dict[str, Any]]
"""Name and request to answer, and what else `ask` takes."""
Told = Callable[[str], None]
"""Is given a line for people."""


def ask(
    name: str,
    request: dict[str, Any],
    *,
    environment: Mapping[str, str] | None = None,
    lean: bool = True,
    files: Sequence[int] = (),
    told: Told | None = None,
) -> dict[str, Any]:
    """The answer to the request `name`. Raises the TrglError that the process raised, and ProcessDiedError.

    `environment` is that of the process instead of this one's; one that is not `lean` imports as any other does.
    `files` are descriptors that it has too; `told` is given, by another thread, each line that it says by `tell`.
    """
    command = [sys.executable, "-m", *([LEAN] if lean else []), REQUESTS[name]]
    if lean:
        environment = {**(os.environ if environment is None else environment), CALLER: str(os.getpid())}
    with contextlib.nullcontext() if told is None else _Heard(told) as heard:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if heard is None else heard.stream,
            encoding="utf-8",
            errors="replace",
            check=False,
            pass_fds=files,
        )
    said = done.stderr if heard is None else heard.words
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        answer = json.loads(lines[-1])
        assert isinstance(answer, dict)
        if "error" in answer:
            raise from_record(answer["error"])
        return answer
    words = said.strip().splitlines()
    last = words[-1] if words else f"the process ended with status {done.returncode}"
    died = ProcessDiedError(
        f"the {name} process failed: {last}",
        returncode=done.returncode,
        hint="killed for want of memory, most likely" if done.returncode == -9 else "",
    )
    died.add_note(said)
    raise died


class _Heard:
    """The stderr of a process, read line by line as it comes: `words`, but what it tells goes to `told`."""

    def __init__(self, told: Told) -> None:
        self.words = ""
        self._told = told
        here, self.stream = os.pipe()
        self._thread = threading.Thread(target=self._read, args=(here,), name="trgl-ask", daemon=True)

    def __enter__(self) -> "_Heard":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self.stream)
        self._thread.join()

    def _read(self, here: int) -> None:
        with os.fdopen(here, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if not line.startswith(_TELLING):
                    self.words += line
                else:
                    self._told(line[len(_TELLING) :].rstrip("\n"))


def tell(line: str) -> None:
    """Say `line` to whoever asked this process."""
    print(f"{_TELLING}{line}", file=sys.stderr, flush=True)  # noqa: T201 -- the stream between the two


def why_not(error: TrglError) -> tuple[str, str]:
    """Status (did_not_fit or failed) and reason of what a process could not measure because of `error`."""
    if isinstance(error, ProcessDiedError):
        if error.returncode == -signal.SIGKILL:
            return "did_not_fit", "killed by the system, most likely for want of memory"
        if error.returncode == -signal.SIGINT:
            return "failed", "interrupted"
    return "failed", error.message


def answer(work: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """The main of such a process: do `work` on the request. What anything else writes to stdout goes to stderr."""
    request = json.load(sys.stdin)
    gc.freeze()  # 200 000 objects of imported modules, which every collection would walk (0.1 s)
    gc.enable()  # a lean process did not collect while it imported
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="ascii") as out:
        os.dup2(2, 1)  # not sys.stdout alone: libraries and programs that the work starts write there too
        try:
            result = work(request)
        except TrglError as error:
            error.add_note(traceback.format_exc())  # for -v: it cannot cross by itself
            result = {"error": to_record(error)}
        out.write(json.dumps(result, default=str) + "\n")
    return 0
