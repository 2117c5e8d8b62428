"""Code pages of the libraries in this process: they count in RSS, and most are touched once, while importing.

After `import torch` and a first pass some 90 MB of libtorch's code are resident, of which training touches a third.
The pages are clean copies of the file: dropped, they leave RSS at once, and what is needed again comes back from the
page cache (0.4 s in all, once).
"""

import ctypes
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MADV_DONTNEED = 4

# some 500 mappings of 24 lines each: looked for, not read line by line, which took 30 ms each time
_CODE = re.compile(r"^(?P<start>[0-9a-f]+)-(?P<stop>[0-9a-f]+) r-xp \S+ \S+ \S+ +(?P<path>/.*)$", re.MULTILINE)
_RESIDENT = re.compile(r"^Rss: +(\d+) kB$", re.MULTILINE)
_OWN = re.compile(r"^Anonymous: +(\d+) kB$", re.MULTILINE)


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
    for mapping in _CODE.finditer(smaps):
        resident, own = (_kilobytes(field, smaps, mapping.end()) for field in (_RESIDENT, _OWN))
        if resident and not own and not mapping["path"].endswith("(deleted)"):
            yield int(mapping["start"], 16), int(mapping["stop"], 16), resident * 1024


def _kilobytes(field: re.Pattern[str], smaps: str, position: int) -> int:
    """The next `field` behind `position`: every mapping has all fields."""
    found = field.search(smaps, position)
    return int(found[1]) if found else 0
