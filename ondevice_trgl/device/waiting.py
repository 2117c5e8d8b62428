"""How torch's threads wait for each other between two operations: by spinning, or asleep where others want the cores.

Spinning is fastest on an idle machine (a step of ResNet-18 on two cores: by 15 %) and slowest beside an app: the thread
that is waited for stands in line behind the one that waits. GNU OpenMP, which torch's Linux wheels carry, spins some
milliseconds, but hardly at all while it has more threads than the machine has processors. So a thread that holds an
idle team makes all others wait asleep, and ending that team makes them spin again: no environment is touched.

Where the OpenMP is another, or the system does not say how long threads stand in line, everything stays as it is.
"""

import ctypes
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_LOOK_SECONDS = 1.0
_BUSY, _QUIET = 0.1, 0.05
"""Time that threads stood in line, over time that passed: from where on they sleep, below which they may spin."""
_QUIET_LOOKS = 5
"""So many in a row, before they spin again."""
_MOST_IDLE = 64
"""Threads, each with a stack of its own."""
_HARD = 2  # omp_pause_hard
_CHOSEN = ("OMP_WAIT_POLICY",)
"""Where whoever started the process has said how threads wait, that stands."""


def gnu_openmp() -> ctypes.CDLL | None:
    """The GNU OpenMP that is loaded, if one is that can end its teams (of GCC 9 or later)."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        path = next((line.split(maxsplit=5)[-1] for line in lines if "libgomp" in line), None)
        found = None if path is None else ctypes.CDLL(path)
    except OSError:
        return None
    return found if hasattr(found, "omp_pause_resource_all") and hasattr(found, "GOMP_parallel") else None


def end_team() -> None:
    """End the team of the calling thread, which starts another when it needs one. Not from inside of a team."""
    if (library := gnu_openmp()) is not None:
        library.omp_pause_resource_all(_HARD)


def lined_up(tasks: Path = Path("/proc/self/task")) -> dict[str, float] | None:
    """Seconds that each thread of this process has stood in line for a processor; None where nobody tells."""
    found: dict[str, float] = {}
    for task in tasks.iterdir() if tasks.is_dir() else ():
        try:
            found[task.name] = int((task / "schedstat").read_text(encoding="ascii").split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            continue  # it has ended
    return found or None


class Waiting:
    """Has the threads of torch, `threads` in each team, wait asleep while others want the processors too.

    To be used by one thread. Memory: a few stacks, of which some kilobytes each are touched.
    """

    def __init__(
        self,
        threads: int,
        *,
        library: ctypes.CDLL | None = None,
        lined_up: Callable[[], Mapping[str, float] | None] = lined_up,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._library = library or gnu_openmp()
        self._lined_up, self._clock = lined_up, clock
        self._before, self._looked = lined_up(), clock()
        self._quiet = 0
        self.asleep = False
        """Whether threads that wait sleep."""
        self._holder: ThreadPoolExecutor | None = None
        processors = 1 if self._library is None else int(self._library.omp_get_num_procs())
        self._team = max(2, processors - threads + 2)  # more than processors, beside a team that computes
        chosen = any(name in os.environ for name in _CHOSEN)
        if self._library is None or chosen or threads < 2 or self._team > _MOST_IDLE or self._before is None:
            return
        self._holder = ThreadPoolExecutor(1, "trgl-waiting")
        # once now: the C library keeps the stacks, so that later on no more memory is mapped than at the start
        self._sleep()
        self._spin()

    def look(self) -> bool:
        """Look, once a second, how long threads had to stand in line, and act on it; whether anything changed."""
        now = self._clock()
        if self._holder is None or (passed := now - self._looked) < _LOOK_SECONDS:
            return False
        found = self._lined_up() or {}
        before = self._before or {}
        share = sum(max(0.0, spent - before.get(task, 0.0)) for task, spent in found.items()) / passed
        self._before, self._looked = found, now
        self._quiet = self._quiet + 1 if share < _QUIET else 0
        if not self.asleep and share > _BUSY:
            self._sleep()
            return True
        if self.asleep and self._quiet >= _QUIET_LOOKS:
            self._spin()
            return True
        return False

    def _sleep(self) -> None:
        assert self._library is not None
        assert self._holder is not None
        nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
        self._holder.submit(
            self._library.GOMP_parallel, nothing, None, ctypes.c_uint(self._team), ctypes.c_uint(0)
        ).result()
        self.asleep = True

    def _spin(self) -> None:
        assert self._library is not None
        assert self._holder is not None
        self._holder.submit(self._library.omp_pause_resource_all, _HARD).result()
        self.asleep = False

    def close(self) -> None:
        """End what was started: threads wait again as they did before."""
        if self._holder is not None:
            self._spin()
            self._holder.shutdown()
            self._holder = None
