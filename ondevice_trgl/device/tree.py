"""The processes that this one has started, and theirs: what they hold in memory counts towards its budget."""

import contextlib
import os
from pathlib import Path

from ondevice_trgl.device.meter import PeakMeter


class TreeMeter(PeakMeter):
    """Another meter of this process, and beside it what its descendants hold whenever that is looked at."""

    kind = "rss"

    def __init__(self, meter: PeakMeter) -> None:
        self._meter, self._highest, self._ever = meter, 0, False

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self._meter.name}, child processes between steps" if self._ever else self._meter.name

    def look(self) -> None:
        self.others = descendants_bytes()
        self._highest = max(self._highest, self.others)
        self._ever |= self.others > 0

    def reset(self) -> None:
        self._meter.reset()
        self._highest = self.others

    def peak_bytes(self) -> int:
        """At most what both took at their highest, be it at different times."""
        return self._meter.peak_bytes() + self._highest

    def current_bytes(self) -> int:
        return self._meter.current_bytes() + self.others


def descendants_bytes(proc: Path = Path("/proc")) -> int:
    """What all descendants of this process hold now and share with no other process; 0 where there are none.

    Where the kernel does not tell private pages from shared ones (Linux before 4.14, other systems), their RSS.
    """
    if not _has_children():  # one system call: looking for them takes milliseconds
        return 0
    import psutil

    total = 0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # ended since
            private = _private_bytes(proc / str(child.pid) / "smaps_rollup")
            total += int(child.memory_info().rss) if private is None else private
    return total


def child_meter(proc: Path = Path("/proc")) -> str:
    """What of child processes is counted here, in words."""
    shown = _private_bytes(proc / "self" / "smaps_rollup") is not None
    return "private pages, between steps" if shown else "RSS, between steps"


def process_tree_rss() -> int:
    """What this process holds now (RSS), and its descendants beside that."""
    import psutil

    return int(psutil.Process().memory_info().rss) + descendants_bytes()


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # leaves whoever has ended to its parent
    except ChildProcessError:
        return False
    except (AttributeError, OSError):  # not POSIX
        return True
    return True


def _private_bytes(path: Path) -> int | None:
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    private = [line.split() for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:"))]
    return sum(int(words[1]) * 1024 for words in private) if private else None
