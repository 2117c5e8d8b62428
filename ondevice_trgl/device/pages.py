"""Code pages of the libraries in this process: they count in RSS, and most are touched once, while importing.

After `import torch` and a first pass some 90 MB of libtorch's code are resident, of which training touches a third.
The pages are clean copies of the file: dropped, they leave RSS at once, and what is needed again comes back from the
page cache (0.4 s in all, once).
"""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

MADV_DONTNEED = 4


def release_code_pages(proc: Path = Path("/proc/self")) -> int:
    """Drop the resident code pages of mapped files; returns the bytes that were resident. Linux; elsewhere 0.

    Only private mappings that are executable, not writable and unchanged are touched, so that nothing can be lost.
    """
    if not sys.platform.startswith("linux"):
        return 0
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        text = (proc / "smaps").read_text(encoding="utf-8", errors="replace")
    except (OSError, AttributeError):
        return 0
    released = 0
    for start, stop, resident in _clean_code(text):
        if libc.madvise(start, stop - start, MADV_DONTNEED) == 0:
            released += resident
    return released


def drop_pages(address: int, size: int) -> None:
    """Drop the pages in which those bytes of a file mapping lie, none of which was written to. Linux; else nothing."""
    if not sys.platform.startswith("linux") or not size:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    start = address - address % mmap.PAGESIZE
    libc.madvise(start, address + size - start, MADV_DONTNEED)


def _clean_code(smaps: str) -> Iterator[tuple[int, int, int]]:
    """(start, stop, resident bytes) of every mapping of a file that is r-xp and has no page of its own."""
    start = stop = 0
    resident, own, code = 0, 0, False
    for line in smaps.splitlines():
        field, _, rest = line.partition(" ")
        if field.endswith(":"):
            if field == "Rss:":
                resident = int(rest.split()[0]) * 1024
            elif field == "Anonymous:":
                own = int(rest.split()[0])
            elif field == "VmFlags:" and code and not own and resident:
                yield start, stop, resident
            continue
        parts = line.split(maxsplit=5)
        start, stop = (int(part, 16) for part in parts[0].split("-"))
        code = (
            len(parts) == 6 and parts[1] == "r-xp" and parts[5].startswith("/") and not parts[5].endswith("(deleted)")
        )
        resident = own = 0
