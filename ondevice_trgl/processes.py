"""Short-lived processes of our own: ask one something, and what its imports and tensors took is gone with it.

A child module is run as `python -m` would, in a lean process; it reads one JSON request on stdin and prints one JSON
answer.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ondevice_trgl.errors import TrglError, from_record, to_record

_LEAN = "ondevice_trgl.device.lean"


@dataclass(frozen=True)
class Ended:
    """How a child ended: its answer, or None with the status and the last words."""

    answer: dict[str, Any] | None
    returncode: int
    last_words: str
    stderr: str = ""


def ask(module: str, request: dict[str, Any]) -> Ended:
    """Run `module` on `request`. Raises the TrglError that the child raised."""
    done = subprocess.run(
        [sys.executable, "-m", _LEAN, module],
        input=json.dumps(request),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        answer = json.loads(lines[-1])
        if "error" in answer:
            raise from_record(answer["error"])
        return Ended(answer, 0, "")
    words = done.stderr.strip().splitlines()
    last = words[-1] if words else f"the process ended with status {done.returncode}"
    return Ended(None, done.returncode, last, done.stderr)


def answer(work: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """The main of a child: do `work` on the request. What anything else writes to stdout goes to stderr."""
    request = json.load(sys.stdin)
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
