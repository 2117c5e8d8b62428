"""The memory cgroups (v1 or v2) that hold this process: their limit, what they counted, how long work waited."""

import functools
from pathlib import Path
from typing import Any

_UNLIMITED = 1 << 60
"""cgroup v1 writes a number near 2^63 where there is no limit."""
_PROC, _SYS = Path("/proc"), Path("/sys/fs/cgroup")
_LIMITS = {"memory.max", "memory.high", "memory.limit_in_bytes"}
"""Above memory.high nothing is killed, but everything is slowed down until it is below again: as good as a limit."""
EVENTS = ("high", "max", "oom", "oom_kill")


def memory_limit_bytes(proc: Path = _PROC, sys: Path = _SYS) -> int | None:
    """The lowest memory limit of the cgroups that hold this process; None where there is none."""
    return min((limit for _, limit in _limits(proc, sys)), default=None)


def free_bytes(proc: Path = _PROC, sys: Path = _SYS) -> int | None:
    """What the cgroups leave to this process beside what it holds; None where none has a limit.

    File pages that the kernel can drop count as free.
    """
    return min((max(0, limit - _in_use(folder)) for folder, limit in _limits(proc, sys)), default=None)


def memory_events(proc: Path = _PROC, sys: Path = _SYS) -> dict[str, int]:
    """How often this process's own cgroup went over memory.high, was at its limit, out of memory, and lost a process.

    Counted since the group was made. v1 counts the second and the last alone. Empty where there is no such group.
    """
    for folder in _folders(proc, sys):
        counts = _table(folder / "memory.events")
        if counts:
            return {name: counts[name] for name in EVENTS if name in counts}
        failed = _number(folder / "memory.failcnt")
        if failed is not None:
            killed = _table(folder / "memory.oom_control").get("oom_kill")
            return {"max": failed} | ({} if killed is None else {"oom_kill": killed})
    return {}


def stall_seconds(proc: Path = _PROC, sys: Path = _SYS) -> tuple[float, str] | None:
    """How long something waited for memory in all, and the file that says so; None where the kernel has no PSI.

    Of this process's cgroup, or else of the whole machine.
    """
    for path in (*(folder / "memory.pressure" for folder in _folders(proc, sys)[:1]), proc / "pressure" / "memory"):
        for line in _lines(path):
            kind, *pairs = line.split()
            total = dict(pair.partition("=")[::2] for pair in pairs).get("total", "")
            if kind == "some" and total.isdigit():
                return int(total) / 1e6, str(path)
    return None


def oom_kills(proc: Path = _PROC) -> int | None:
    """How many processes the kernel has killed for want of memory since it started, in all groups; None: not counted.

    In a container too: those of the whole machine.
    """
    return _table(proc / "vmstat").get("oom_kill")


def boot(proc: Path = _PROC) -> str:
    """What tells this start of the kernel from others; "" where it does not say."""
    return " ".join(_lines(proc / "sys" / "kernel" / "random" / "boot_id"))


def page_faults() -> int:
    """Times that this process touched memory which the kernel had to give first; 0 where that is not counted."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Watch:
    """What the system counts from now on."""

    def __init__(self) -> None:
        self._events, self._stall, self._faults = memory_events(), stall_seconds(), page_faults()

    def since(self) -> dict[str, Any]:
        """JSON-ready: `memory_events`, `stall_seconds` (None without PSI) and `stall_meter`, `page_faults` (minor)."""
        stall, waited = stall_seconds(), None
        if stall is not None and self._stall is not None:
            waited = stall[0] - self._stall[0]
        events = {name: count - self._events.get(name, 0) for name, count in memory_events().items()}
        return {
            "memory_events": events,
            "stall_seconds": waited,
            "stall_meter": stall[1] if stall else "none",
            "page_faults": page_faults() - self._faults,
        }


def _limits(proc: Path, sys: Path) -> list[tuple[Path, int]]:
    """Each limit that applies, with the folder that it is of."""
    found = [(path.parent, _number(path)) for path in _limit_files(_groups(proc), sys)]
    return [(folder, limit) for folder, limit in found if limit is not None and 0 < limit < _UNLIMITED]


@functools.lru_cache(maxsize=8)  # asked before every step
def _limit_files(groups: tuple[str, ...], sys: Path) -> list[Path]:
    paths = [folder / name for folder in _folders_of(groups, sys) for name in _LIMITS]
    return [path for path in paths if path.is_file()]


def _in_use(folder: Path) -> int:
    """What a group holds and the kernel cannot drop."""
    used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
    pages = _table(folder / "memory.stat")
    droppable = (
        ("total_inactive_file", "total_active_file") if "total_rss" in pages else ("inactive_file", "active_file")
    )
    return max(0, used - sum(pages.get(name, 0) for name in droppable))


def _folders(proc: Path, sys: Path) -> list[Path]:
    """Of the memory controller: this process's group and those around it, up to the root."""
    return _folders_of(_groups(proc), sys)


def _groups(proc: Path) -> tuple[str, ...]:
    return tuple(_lines(proc / "self" / "cgroup"))


def _folders_of(groups: tuple[str, ...], sys: Path) -> list[Path]:
    folders = []
    for line in groups:
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "")
        if controllers == "":
            root = sys
        elif "memory" in controllers.split(","):
            root = sys / "memory"
        else:
            continue
        # inside a container the path may be the host's: folders that do not exist here are passed over
        parts = [part for part in path.split("/") if part and part != ".."]
        folders += [root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [folder for folder in folders if folder.is_dir()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _number(path: Path) -> int | None:
    """The number in a file; None where it is absent, or says "max"."""
    lines = _lines(path)
    return int(lines[0]) if len(lines) == 1 and lines[0].strip().isdigit() else None


def _table(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
