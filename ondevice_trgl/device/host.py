"""What is known of the machine under us: RAM, the memory limit of a container, processor name, usable cores."""

import os
import platform
from pathlib import Path

import psutil

_UNLIMITED = 1 << 60
"""cgroup v1 writes a number near 2^63 where there is no limit."""


def ram_bytes() -> int:
    """Physical memory."""
    return int(psutil.virtual_memory().total)


def usable_ram_bytes() -> int:
    """Physical memory, or the container's limit where that is less."""
    return min(ram_bytes(), memory_limit_bytes() or _UNLIMITED)


def memory_limit_bytes(proc: Path = Path("/proc"), sys: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The lowest memory limit of the cgroups (v1 or v2) that hold this process; None where there is none."""
    limits = [limit for folder, name in _cgroup_files(proc, sys) if (limit := _read_limit(folder / name)) is not None]
    return min(limits, default=None)


def _cgroup_files(proc: Path, sys: Path) -> list[tuple[Path, str]]:
    """Folder and file name of every limit that applies, from this process's group up to the root."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    files = []
    for line in lines:
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "")
        if controllers == "":
            root, name = sys, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = sys / "memory", "memory.limit_in_bytes"
        else:
            continue
        # inside a container the path may be the host's: folders that do not exist here are passed over
        parts = [part for part in path.split("/") if part and part != ".."]
        files += [(root.joinpath(*parts[:depth]), name) for depth in range(len(parts), -1, -1)]
    return files


def _read_limit(path: Path) -> int | None:
    try:
        limit = int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # absent, or "max"
        return None
    return limit if 0 < limit < _UNLIMITED else None


def cpu_count() -> int:
    """Cores that this process may run on; hyper-threads count once."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    try:
        allowed = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        allowed = physical
    return max(1, min(physical, allowed))


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name of the processor, as far as the system tells."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    for key in ("model name", "Model", "Hardware"):  # x86, Raspberry Pi, other ARM boards
        if found.get(key):
            return found[key]
    return platform.processor() or platform.machine()
