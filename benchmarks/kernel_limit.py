"""A command under a memory limit of the kernel's own: a memory cgroup (v1 or v2), without swap.

Everything in the group counts together: the command, the processes that it starts, the page cache of files that they
were the first to touch, the kernel's own tables. What cannot be given back ends in the kernel's out-of-memory killer.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


class NoKernelLimitError(Exception):
    """Memory cgroups cannot be made here."""


@dataclass(frozen=True)
class _Names:
    """Files of one version of cgroups."""

    limit: str
    swap: str
    """Of memory and swap together in v1, of swap in v2."""
    peak: str
    events: str


_V1 = _Names("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control")
_V2 = _Names("memory.max", "memory.swap.max", "memory.peak", "memory.events")


@dataclass(frozen=True)
class Ended:
    """A command that is over."""

    status: int
    """Negative where a signal ended it."""
    timed_out: bool
    out: str
    error: str
    peak_bytes: int
    """The kernel's own maximum of the group, page cache included."""
    killed: bool
    """Whether the out-of-memory killer ended a process of the group."""


class Group:
    """A memory cgroup with a limit; made by `kernel_limit`."""

    def __init__(self, folder: Path, names: _Names) -> None:
        self._folder, self._names = folder, names

    def run(self, command: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout: float) -> Ended:
        """Run `command` in the group; whatever is left of it after `timeout` seconds is killed."""
        enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._folder / "cgroup.procs"), *command]
        process = subprocess.Popen(
            enter, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        timed_out = False
        try:
            out, error = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
            self.empty()
            out, error = process.communicate()
        return Ended(process.returncode, timed_out, out, error, self._peak(), self._kills() > 0)

    def empty(self) -> None:
        """Kill what is left in the group."""
        while pids := (self._folder / "cgroup.procs").read_text(encoding="ascii").split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)

    def _peak(self) -> int:
        return int((self._folder / self._names.peak).read_text(encoding="ascii"))

    def _kills(self) -> int:
        lines = (self._folder / self._names.events).read_text(encoding="ascii").splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])


@contextlib.contextmanager
def kernel_limit(size: int) -> Iterator[Group]:
    """A group that may take `size` bytes; it is gone afterwards. Raises NoKernelLimitError."""
    folder, names = _made()
    group = Group(folder, names)
    try:
        try:
            (folder / names.limit).write_text(str(size), encoding="ascii")
            swap = folder / names.swap
            if swap.exists():  # a kernel without swap accounting has none of it, or the machine has no swap
                swap.write_text("0" if names is _V2 else str(size), encoding="ascii")
        except OSError as error:
            raise NoKernelLimitError(f"{folder}: {error.strerror}") from error
        yield group
    finally:
        group.empty()
        with contextlib.suppress(OSError):  # v1: page cache that is left would keep the group in the kernel
            (folder / "memory.force_empty").write_text("0", encoding="ascii")
        _remove(folder)


def _made() -> tuple[Path, _Names]:
    """A fresh group: below the one that this process is in, or the nearest above where groups can have a limit."""
    reason = "no memory cgroups are mounted"
    for parent, names in _parents():
        folder = parent / f"trgl-bench-{os.getpid()}-{time.monotonic_ns()}"
        try:
            folder.mkdir()
        except OSError as error:
            reason = f"{parent}: {error.strerror}"
            continue
        if all((folder / name).exists() for name in (names.limit, names.peak)):
            return folder, names
        reason = f"{parent}: groups in it have no memory limit, or do not tell their peak"
        _remove(folder)
    raise NoKernelLimitError(reason)


def _parents() -> Iterator[tuple[Path, _Names]]:
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _ROOT, _V2
        elif "memory" in controllers.split(","):
            root, names = _ROOT / "memory", _V1
        else:
            continue
        own = root / path.lstrip("/")
        yield from ((folder, names) for folder in (own, *own.parents) if folder.is_relative_to(root))


def _remove(folder: Path) -> None:
    for _ in range(100):  # a process that was killed leaves the group a moment later
        with contextlib.suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.05)
