"""The thread in which torch computes under a limit.

oneDNN compiles a kernel for each shape. Where memory for its code is refused once, its compiler keeps that error for
the thread, and refuses every new kernel there for good ("could not create a primitive"), however much memory there is.
So the thread is one of our own where the limit can refuse such memory: the caller's must not be spoilt.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TypeVar

import torch

from ondevice_trgl.device.waiting import end_team

T = TypeVar("T")
_NEW_SIZES = count(17)


class Hands:
    """Computes in a thread of its own, with `apart`, or else in the caller's. To be used by one thread.

    Meanwhile the caller's thread computes alone: beside a second team of threads, none would wait for each other awake.
    """

    def __init__(self, *, apart: bool) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self.threads = torch.get_num_threads()
        """That compute: a number of each thread's own."""
        if apart:
            self._start()

    def _start(self) -> None:
        end_team()
        torch.set_num_threads(1)
        self._worker = ThreadPoolExecutor(1, "trgl-compute", initializer=lambda: torch.set_num_threads(self.threads))

    def do(self, work: Callable[[], T]) -> T:
        """`work()`; what it raises is raised here."""
        return work() if self._worker is None else self._worker.submit(work).result()

    def renew(self) -> bool:
        """Go on in a fresh thread if no new kernel can be made in the present one of ours; whether that was so.

        No limit may be set meanwhile.
        """
        if self._worker is None or self.do(_compiles):
            return False
        self.close()
        self._start()
        return True

    def close(self) -> None:
        """End the thread, if there is one."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None
            torch.set_num_threads(self.threads)


def _compiles() -> bool:
    """Whether a kernel for a shape that was never used can be made."""
    size = next(_NEW_SIZES)
    try:
        with torch.no_grad():
            torch.nn.functional.conv2d(
                torch.ones(2, 8, size, 5), torch.ones(8, 8, 3, 3)
            )  # one image alone oneDNN is not asked for
    except RuntimeError:
        return False
    return True
