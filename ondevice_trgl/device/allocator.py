"""The C allocator of this process: which one it is, give freed memory back, tune it. All of it through ctypes.

Nothing happens on import. Where there is no such allocator (musl, macOS, Windows) every call does nothing.
`set_mmap_threshold` changes the whole process and cannot be undone: it is for a process that is ours, like the command
line's. In an app that embeds the library, `blocks_apart` has it for as long as a limit holds, and then leaves glibc
with the threshold that it comes to by itself.
"""

import ctypes
import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
"""Parameter numbers of glibc's mallopt."""

TIGHT = "tight"
HOLDS = {TIGHT: (1 << 20, 12 << 20), "firm": (8 << 20, 64 << 20), "loose": (32 << 20, 64 << 20)}
"""How tight glibc may be held: the size of a block that it takes from the system each time and gives back when freed,
and how much free memory it keeps at the top of its heap. Measured with huge pages, a step of eight modules of ResNet-18
at 64x64 and of ResNet-50 at 128x128, batch 32: tight 57 000 and 325 000 page faults (a quarter of the time), peaks of
376 and 784 MB, firm 7 000 and 133 000, 395 and 784 MB, loose 1 500 and 21 000, 407 and 1 002 MB."""
_GLIBC_MOST_BYTES = 32 << 20
"""As far as glibc raises its own threshold as blocks are freed; it keeps twice that at the top of its heap."""
_SMALL_BYTES = 64 << 10
_LIBRARIES = ("tcmalloc", "jemalloc", "mimalloc")
_tuned = False
"""Whether the threshold was set for good."""


def allocator_name() -> str:
    """glibc | tcmalloc | jemalloc | mimalloc | unknown: the allocator that answers `malloc` in this process."""
    symbols = _symbols()
    if symbols is None:
        return "unknown"
    provider = _library_of(symbols, "malloc")
    for name in _LIBRARIES:
        if name in provider:
            return name
    if provider.startswith("libc.") and glibc_version() is not None:
        return "glibc"
    return "unknown"


def glibc_version() -> str | None:
    """Version of the GNU C library, like "2.36"; None where the C library is another."""
    function = _function(_symbols(), "gnu_get_libc_version", ctypes.c_char_p)
    return None if function is None else function().decode("ascii")


def release_memory() -> None:
    """Give memory that is free but still held back to the system: the C allocator's, and CUDA's where it is in use.

    Python objects are not collected. With jemalloc and mimalloc, which return memory by themselves, only CUDA's.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    match allocator_name():
        case "glibc":
            trim = _function(_symbols(), "malloc_trim", ctypes.c_int, ctypes.c_size_t)
            if trim is not None:
                trim(0)
        case "tcmalloc":
            release = _function(_symbols(), "MallocExtension_ReleaseFreeMemory", None)
            if release is not None:
                release()


def tcmalloc_property(name: str) -> int | None:
    """A number that tcmalloc keeps, like "tcmalloc.heap_limit_mb"; None where malloc is another, or has no such."""
    ask = _function(
        _symbols(),
        "MallocExtension_GetNumericProperty",
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.POINTER(ctypes.c_size_t),
    )
    value = ctypes.c_size_t(0)
    if ask is None or not ask(name.encode(), ctypes.byref(value)):
        return None
    return int(value.value)


def set_tcmalloc_property(name: str, value: int) -> bool:
    """Change such a number; returns whether tcmalloc took it."""
    change = _function(_symbols(), "MallocExtension_SetNumericProperty", ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
    return change is not None and bool(change(name.encode(), value))


def set_mmap_threshold(
    threshold_bytes: int, *, trim_threshold_bytes: int | None = None, max_arenas: int | None = None
) -> bool:
    """Make glibc take blocks of at least `threshold_bytes` from the system, to return them as soon as they are freed.

    Lower is smaller and slower. Also fixes how much free memory glibc keeps at the top of its heap, and the number of
    heaps that threads use. Returns whether all of it took effect: False with another allocator, and where glibc refuses
    a value.
    """
    mallopt = _function(_symbols(), "mallopt", ctypes.c_int, ctypes.c_int, ctypes.c_int)
    if mallopt is None or allocator_name() != "glibc":
        return False
    wanted = (
        (M_MMAP_THRESHOLD, threshold_bytes),
        (M_TRIM_THRESHOLD, trim_threshold_bytes),
        (M_ARENA_MAX, max_arenas),
    )
    taken = [mallopt(parameter, value) for parameter, value in wanted if value is not None]
    return all(result == 1 for result in taken)


def blocks_apart(wanted: bool, hold: str = TIGHT) -> None:
    """Have glibc take large blocks from the system as `hold` says, for as long as a limit on what is mapped holds.

    In its heap, small blocks that stay would keep the room of large ones mapped long after they are free: such room is
    handed out again without being asked for, and no limit sees it. Not `wanted`, it is as `tune` left it, or else as
    glibc comes to be by itself.
    """
    if wanted or _tuned:
        threshold, trim = HOLDS[hold if wanted else TIGHT]
        set_mmap_threshold(threshold, trim_threshold_bytes=trim)
    else:
        set_mmap_threshold(_GLIBC_MOST_BYTES, trim_threshold_bytes=2 * _GLIBC_MOST_BYTES)


def keep_small(size: int) -> None:
    """Have glibc keep `size` bytes for small blocks. To be called after `release_memory`, which gives them back, and
    `blocks_apart`, which has it keep as much.

    C code that is refused a small block mostly looks at nothing, and crashes; it has these left where the limit refuses
    the heap to grow. A large block, a tensor's, comes from the system, and its refusal is an error that can be handled.
    """
    symbols = _symbols()
    take = _function(symbols, "malloc", ctypes.c_void_p, ctypes.c_size_t)
    give = _function(symbols, "free", None, ctypes.c_void_p)
    if allocator_name() == "glibc" and None not in (take, give):
        for block in [take(_SMALL_BYTES) for _ in range(size // _SMALL_BYTES)]:
            give(block)


@dataclass(frozen=True)
class Heaps:
    """Bytes that glibc's malloc has of the system."""

    mapped: int
    free: int
    """Of those: it hands them out again without asking. After `release_memory` most of it is not in memory."""


def glibc_heaps() -> Heaps | None:
    """The heaps of this process; None where malloc is another."""
    if allocator_name() != "glibc":
        return None
    for name, kind in (("mallinfo2", _Mallinfo2), ("mallinfo", _Mallinfo)):  # glibc has the first since 2.33
        ask = _function(_symbols(), name, kind)
        if ask is not None:
            info = ask()
            return Heaps(int(info.arena + info.hblkhd), int(info.fordblks))
    return None


def tune(choice: str) -> None:
    """Prepare the allocator of this process for training, as `choice` (auto, tcmalloc, glibc, system) says.

    glibc is made to hand blocks of a megabyte back at once, and torch to ask for huge pages, which cost fewer faults:
    on ResNet-20 that took the peak from 431 to 355 MiB. Other allocators are left as they are, and so is all with
    "system". Call it before torch allocates anything of size.
    """
    if choice == "system":
        return
    global _tuned
    if set_mmap_threshold(HOLDS[TIGHT][0]):
        _tuned = True
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch looks when it first allocates


def tcmalloc_library() -> Path | None:
    """The tcmalloc that can be preloaded on this machine; None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    names = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
    folders = ("usr/lib/*-linux-gnu", "usr/lib64", "usr/lib", "usr/local/lib")
    return next((path for name in names for folder in folders for path in Path("/").glob(f"{folder}/{name}")), None)


_MALLINFO = (
    *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
    *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
)


class _Mallinfo(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint) for name in _MALLINFO)


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO)


class _DlInfo(ctypes.Structure):
    _fields_ = (
        ("file_name", ctypes.c_char_p),
        ("file_base", ctypes.c_void_p),
        ("symbol_name", ctypes.c_char_p),
        ("symbol_address", ctypes.c_void_p),
    )


@functools.cache  # a limit must be lifted where there is no memory left to open them anew
def _symbols() -> ctypes.CDLL | None:
    """The symbols of the process as it runs, preloaded libraries first."""
    if os.name != "posix":
        return None
    try:
        return ctypes.CDLL(None)
    except OSError:
        return None


def _function(symbols: ctypes.CDLL | None, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(symbols, name, None)
    if function is not None:
        function.restype, function.argtypes = result, arguments
    return function


@functools.cache  # asked before every step
def _library_of(symbols: ctypes.CDLL, symbol: str) -> str:
    """File name of the library that provides `symbol`; empty where that cannot be told."""
    dladdr = _function(symbols, "dladdr", ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(_DlInfo))
    function = getattr(symbols, symbol, None)
    if dladdr is None or function is None:
        return ""
    info = _DlInfo()
    found = dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info))
    return Path(os.fsdecode(info.file_name)).name if found and info.file_name else ""
