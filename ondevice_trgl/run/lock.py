"""Who works on a run: a lock on its folder or on one of its files, which ends with the process that holds it."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from ondevice_trgl.errors import RunDirError

_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
"""Opening a pipe, should one stand there, would wait for who writes to it."""
_TRIES, _PAUSE_SECONDS = 5, 0.02
"""Whoever only looks, see `is_held`, has it for a moment."""


@contextlib.contextmanager
def held(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep `path` to this caller for the time of the context, or with others who share it; nothing is written.

    Raises RunDirError where someone else has it. Where the file system knows no locks, nobody is kept out.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | _NO_WAIT)
    except OSError:
        yield
        return
    try:
        for left in reversed(range(_TRIES)):
            if _locked(file, shared=shared):
                break
            if not left:
                raise RunDirError(
                    f"{path} is in use: a process that is alive works on it",
                    hint="wait until it is done, or stop it; it leaves a run that can be resumed",
                )
            time.sleep(_PAUSE_SECONDS)
        yield
    finally:
        os.close(file)


def is_held(path: Path) -> bool:
    """Whether a process that is alive, this one or another, keeps `path` to itself."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | _NO_WAIT)
    except OSError:
        return False
    try:
        return not _locked(file, shared=True)
    finally:
        os.close(file)


def _locked(file: int, *, shared: bool) -> bool:
    """Whether nobody is in the way of such a lock."""
    try:
        import fcntl  # not everywhere
    except ImportError:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
