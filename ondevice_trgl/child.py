"""Short-lived processes of our own: ask one something, and what its imports and tensors took is gone with it.

A child module is run with `python -m`; it reads one JSON request on stdin and prints one JSON answer.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ondevice_trgl.errors import TrglError, from_record, to_record


@dataclass(frozen=True)
class Ended:
    """How a child ended: its answer, or None with the status and the last words."""

    answer: dict[str, Any] | None
    returncode: int
    last_words: str


def ask(module: str, request: dict[str, Any]) -> Ended:
    """Run `python -m module` on `request`. Raises the TrglError that the child raised."""
    done = subprocess.run(
        [sys.executable, "-m", module], input=json.dumps(request), capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        answer = json.loads(lines[-1])
        if "error" in answer:
            raise from_record(answer["error"])
        return Ended(answer, 0, "")
    words = done.stderr.strip().splitlines()
    return Ended(None, done.returncode, words[-1] if words else f"the process ended with status {done.returncode}")


def answer(work: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """The main of a child: do `work` on the request. What the work prints goes to stderr."""
    request = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            result = work(request)
        except TrglError as error:
            result = {"error": to_record(error)}
    sys.stdout.write(json.dumps(result) + "\n")
    return 0
