"""What the command's process sets before torch is imported: the C allocator, how threads wait, how it imports.

The allocator decides both the peak and the speed. Threads spin briefly while they wait for each other: beside an app
that wants the cores too, the default run takes 3 s instead of 16, and 1.4 on an idle machine.

Only the command line does this. A program that embeds the library keeps all of it as it is.
"""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.device.allocator import allocator_name, tune
from ondevice_trgl.device.lean import make_lean
from ondevice_trgl.device.start import no_tcmalloc, tuned_environment

_MOST_IN_ENVIRONMENT = 60_000
"""Characters; Linux takes 128 KB."""
ORDER = "TRGL_STARTED_WITH"
"""Environment variable that tells a process started again what to do: command, options and shell, as JSON."""


def prepare_process(shell: Shell, command: str, given: dict[str, Any]) -> None:
    """Replace a process of the command's own by one that does `command` on `given` and nothing else (see `again`)."""
    if shell.own_process:
        _start_again({**vars(shell), "own_process": False}, command, given, given["allocator"])


def settle(choice: str) -> None:
    """Bring about the allocator `choice` in a process that has just been started for it.

    Raises UsageError where tcmalloc is asked for and not to be had.
    """
    if choice == "tcmalloc" and allocator_name() != "tcmalloc":
        raise no_tcmalloc()
    make_lean()
    tune(choice)


def take_order(text: str) -> str:
    """The order that the environment variable holds, or the file whose descriptor it names."""
    if not text.isdigit():
        return text
    with os.fdopen(int(text), encoding="ascii") as file:
        file.seek(0)
        return file.read()


def _order(text: str) -> str:
    """What the environment variable is to hold: a system refuses one that is too long, as with many file names."""
    if len(text) <= _MOST_IN_ENVIRONMENT:
        return text
    file = tempfile.TemporaryFile(mode="w", encoding="ascii")  # noqa: SIM115 -- it goes with the process
    file.write(text)
    file.flush()
    descriptor = os.dup(file.fileno())
    os.set_inheritable(descriptor, True)
    return str(descriptor)


def _start_again(shell: dict[str, Any], command: str, given: dict[str, Any], choice: str) -> None:
    environment = tuned_environment(os.environ, choice)
    environment[ORDER] = _order(json.dumps({"command": command, "given": given, "shell": shell}))
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    # what was typed stands behind, for whoever looks at the list of processes
    arguments = [sys.executable, *flags, "-m", "ondevice_trgl.cli.again", *sys.argv[1:]]
    sys.stdout.flush()
    os.execve(sys.executable, arguments, environment)
