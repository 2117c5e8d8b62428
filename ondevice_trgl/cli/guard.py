"""The one place where an exception becomes an exit code."""

import contextlib
import os
import sys
from collections.abc import Callable

from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.cli.signals import Stopped
from ondevice_trgl.errors import TrglError


def guarded(work: Callable[[], int], shell: Shell) -> int:
    """The exit code of `work`. Every error ends here as a line on stderr."""
    try:
        code = _run(work, shell)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # whoever read stdout has gone; without this the interpreter complains once more as it flushes at exit
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(work: Callable[[], int], shell: Shell) -> int:
    try:
        return work()
    except Stopped as stop:
        shell.note("stopped")
        return 128 + stop.signum
    except KeyboardInterrupt:
        return 130
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 1
    except TrglError as error:
        return shell.fail(error)
    except BrokenPipeError:
        raise
    except Exception as error:
        return shell.crash(error)
