"""A byte limit on this process that fails cleanly: an allocation beyond it raises, and the step can be tried again.

tcmalloc: its own heap limit. It counts what the heap holds in memory, and gives free memory back before it refuses.
Else on Linux: the soft RLIMIT_DATA. It counts VmData, every private writable page that was asked for, touched or not;
with tcmalloc, whose address space only grows, that would refuse long before the memory is used up.
CUDA: torch's per-process memory fraction of one device.

On CPU the limit is the budget, less what counts in RSS beside the heap (file-backed pages above all), so that RSS stays
within it. A limit holds for the whole process, other threads included. `lift` puts back what was there before.
"""

import contextlib
import re
import sys
from pathlib import Path
from typing import Protocol

import torch

from ondevice_trgl.device.allocator import (
    HOLDS,
    TIGHT,
    Heaps,
    blocks_apart,
    glibc_heaps,
    keep_small,
    release_memory,
    set_tcmalloc_property,
    tcmalloc_property,
)
from ondevice_trgl.device.pages import release_code_pages

CODE_BYTES = 46_000_000
"""Library code that a training step touches, and that comes back into memory whenever it was given back."""
CODE_GROWTH_BYTES = 6_000_000
"""Room for more of it than was ever seen."""
_SMALL_BLOCKS_BYTES = 8 << 20
"""Kept in the heap for blocks that C code cannot do without."""
_HOPELESS_BYTES = 16_000_000
"""By so much may more be in use than a limit allows, and steps still become smaller until they fit."""
_KERNEL_UNTOUCHED = 0.85
"""Of what is mapped for the code of kernels."""
_HEAP_LIMIT = "tcmalloc.heap_limit_mb"
_ASKED = re.compile(r"tried to allocate (\d+) bytes")
_WORDS = (
    *("allocate memory", "not enough memory", "out of memory", "could not create a primitive", "bad_alloc"),
    *("without exception set", "without setting an exception"),  # what Python says where its own small blocks fail
)


def lacks_memory(error: BaseException | None) -> bool:
    """Whether `error`, or what it came from, is a refusal of memory."""
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _WORDS):
            return True
        error = error.__cause__
    return False


def refused_bytes(error: BaseException | None) -> int:
    """How much was asked for when memory was refused; 0 where `error`, and what it came from, do not say."""
    while error is not None:
        if asked := _ASKED.search(str(error)):
            return int(asked[1])
        error = error.__cause__
    return 0


class Leftovers:
    """What a backward pass that failed leaves behind: its graph, in autograd's queue, until another pass clears that.

    The queue is one for each thread and takes the newest nodes first: only a graph that is older than all others
    clears it whole. So make this before training, in the thread that trains.
    """

    def __init__(self) -> None:
        with torch.enable_grad():
            self._leaf = torch.ones((), requires_grad=True)
            self._oldest = self._leaf * 1.0

    def drop(self) -> None:
        """Let go of what failed passes left; their activations can be the most of what is in memory."""
        with torch.enable_grad():
            self._oldest.backward(retain_graph=True)
        self._leaf.grad = None


class MemoryLimit(Protocol):
    """What holds a process inside a number of bytes."""

    name: str
    refuses_code: bool
    """Whether it can refuse memory for the code of kernels, which spoils a thread for oneDNN."""
    gives_back: bool
    """Whether free memory that the allocator keeps is given back before anything is refused."""
    holds: tuple[str, ...] = (TIGHT,)
    """How the allocator may be held while the limit is set, the fastest first, each taking less memory."""

    def set(self, budget_bytes: int) -> None:
        """From now on, allocations that would take the process above `budget_bytes` fail."""

    def can_hold(self, budget_bytes: int) -> bool:
        """Whether what is in use now is within `budget_bytes`, or nearly.

        Else `set` would refuse everything, to every thread, and not lower what is in use: a thread of Python's that is
        refused memory as it starts never says that it has, and whoever started it waits for ever.
        """
        return True

    def lift(self) -> None:
        """Put back the limit that was there before the first `set`."""

    def calibrate(self) -> None:
        """Look again at what counts and is no memory that was asked for: threads that have started. Not while set."""

    def hold(self, how: str) -> None:
        """From now on, while the limit is set, have the allocator held as that, one of `holds`."""
        return


class _CpuLimit(MemoryLimit):
    """Knows what counts in RSS and is no memory that was allocated."""

    _highest = CODE_BYTES

    def _files(self, memory: dict[str, int]) -> int:
        """Of file-backed pages, what there was at most: code that was given back comes again with the next step."""
        self._highest = max(self._highest, memory["RssFile"])
        return self._highest + memory["RssShmem"] + CODE_GROWTH_BYTES

    def calibrate(self) -> None:
        pass


class NoLimit(MemoryLimit):
    """Where the system offers none: the budget is planned and measured, and not enforced."""

    name = "nothing: planned and measured alone"
    refuses_code = gives_back = False

    def set(self, budget_bytes: int) -> None:
        """Does nothing."""

    def lift(self) -> None:
        """Does nothing."""

    def calibrate(self) -> None:
        """Does nothing."""


class HeapLimit(_CpuLimit):
    """tcmalloc's `heap_limit_mb`. Raises OSError where malloc is not tcmalloc, or an old one."""

    name = "tcmalloc heap limit"
    refuses_code, gives_back = False, True

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._proc, self._set = proc, False
        self._before = tcmalloc_property(_HEAP_LIMIT)
        if self._before is None or not set_tcmalloc_property(_HEAP_LIMIT, self._before):
            raise OSError("no tcmalloc with a heap limit here")
        _start_threads()
        self._files(_memory(proc))

    def set(self, budget_bytes: int) -> None:
        memory = _memory(self._proc)
        heap = tcmalloc_property("tcmalloc.pageheap_committed_bytes") or 0
        beside = self._files(memory) + max(0, memory["RssAnon"] - heap)
        set_tcmalloc_property(_HEAP_LIMIT, max(1, (budget_bytes - beside) >> 20))  # 0 would be no limit
        self._set = True

    def lift(self) -> None:
        if self._set:
            set_tcmalloc_property(_HEAP_LIMIT, self._before or 0)
            self._set = False


class DataLimit(_CpuLimit):
    """Soft RLIMIT_DATA. Linux. Raises OSError, ImportError or ValueError where there is none."""

    name = "RLIMIT_DATA"
    refuses_code, gives_back = True, False

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        if not sys.platform.startswith("linux"):
            raise OSError("RLIMIT_DATA counts mapped memory on Linux alone")
        import resource

        self._resource, self._proc, self._set = resource, proc, False
        self._before: tuple[int, int] = resource.getrlimit(resource.RLIMIT_DATA)
        self.holds = self.holds if glibc_heaps() is None else tuple(reversed(HOLDS))
        self._hold = TIGHT
        _start_threads()
        self.calibrate()

    def calibrate(self) -> None:
        release_memory()
        memory = _memory(self._proc)
        self._files(memory)
        # thread stacks, parts of the libraries' own data: asked for, and never touched; what is free in the heap was
        # touched before, and will be again
        heaps = glibc_heaps() or Heaps(0, 0)
        self._untouched = max(0, memory["VmData"] - memory["RssAnon"] - heaps.free)
        self._beside_heaps = memory["VmData"] - heaps.mapped

    def _never_touched(self, memory: dict[str, int]) -> int:
        """Mapped, and no memory: as it was calibrated, and what was mapped since by others than malloc.

        That is the code of kernels: oneDNN maps 256 KB for each, and writes a few of them.
        """
        heaps = glibc_heaps()
        grown = 0 if heaps is None else max(0, memory["VmData"] - heaps.mapped - self._beside_heaps)
        return self._untouched + int(_KERNEL_UNTOUCHED * grown)

    def _limit_of(self, budget_bytes: int, memory: dict[str, int]) -> int:
        beside = self._files(memory) + memory["VmStk"]
        return max(1, budget_bytes - beside + self._never_touched(memory))

    def can_hold(self, budget_bytes: int) -> bool:
        memory = _memory(self._proc)
        in_use = memory["VmData"] - (glibc_heaps() or Heaps(0, 0)).free
        return self._limit_of(budget_bytes, memory) >= in_use - _HOPELESS_BYTES

    def set(self, budget_bytes: int) -> None:
        limit = self._limit_of(budget_bytes, _memory(self._proc))
        for most in self._before:
            if most != self._resource.RLIM_INFINITY:
                limit = min(limit, most)
        if not self._set:
            blocks_apart(True, self._hold)
            keep_small(_SMALL_BLOCKS_BYTES)
        self._resource.setrlimit(self._resource.RLIMIT_DATA, (limit, self._before[1]))
        self._set = True

    def lift(self) -> None:
        if self._set:
            self._resource.setrlimit(self._resource.RLIMIT_DATA, self._before)
            self._set = False
            blocks_apart(False)

    def hold(self, how: str) -> None:
        if how != self._hold:
            self._hold = how
            if self._set:
                blocks_apart(True, how)


class CudaLimit(MemoryLimit):
    """The share of one GPU's memory that torch's allocator may reserve; the CUDA context is not in it."""

    name = "CUDA memory fraction"
    refuses_code = gives_back = False

    def __init__(self, index: int) -> None:
        self._index = index
        self._total = int(torch.cuda.get_device_properties(index).total_memory)
        self._set = False

    def set(self, budget_bytes: int) -> None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget_bytes / self._total), self._index)
        self._set = True

    def lift(self) -> None:
        if self._set:
            torch.cuda.set_per_process_memory_fraction(1.0, self._index)
            self._set = False

    def calibrate(self) -> None:
        pass


def limit_for(device: torch.device) -> MemoryLimit:
    """The limit that works here for `device`."""
    if device.type == "cuda":
        return CudaLimit(device.index or 0)
    for kind in (HeapLimit, DataLimit):
        with contextlib.suppress(OSError, ImportError, ValueError, KeyError):
            return kind()
    return NoLimit()


def start_libraries(device: torch.device) -> None:
    """Have cuBLAS and cuDNN take on a GPU what they keep as long as the process lives."""
    with torch.enable_grad():
        image = torch.ones(2, 8, 16, 16, device=device)
        kernel = torch.ones(8, 8, 3, 3, device=device, requires_grad=True)
        matrix = torch.ones(16, 16, device=device, requires_grad=True)
        (torch.nn.functional.conv2d(image, kernel).sum() + (image[0, 0] @ matrix).sum()).backward()


def _memory(proc: Path) -> dict[str, int]:
    pairs = (line.split(":") for line in (proc / "status").read_text("ascii", errors="replace").splitlines())
    wanted = ("VmData", "VmStk", "RssAnon", "RssFile", "RssShmem")
    return {key: int(value.split()[0]) * 1024 for key, value in pairs if key in wanted}


def _start_threads() -> None:
    """Have torch start its threads and touch the code that every step needs, and no other: all of that counts."""
    release_code_pages()
    with torch.enable_grad():
        weight = torch.ones(8, 8, 3, 3, requires_grad=True)
        torch.nn.functional.conv2d(torch.ones(8, 8, 16, 16), weight).sum().backward()
