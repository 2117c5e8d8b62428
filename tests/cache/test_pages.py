"""What the kernel holds of a boundary's file: asked of the kernel itself."""

import ctypes
import mmap
import os
import sys
from pathlib import Path

import pytest
import torch

from ondevice_trgl.cache.disk import DiskCache
from ondevice_trgl.cache.pages import Pages
from ondevice_trgl.run.batches import shuffled, shuffled_by_chunk

SHAPE, ROWS = (1024, 4), 4096  # 16 KiB a row, 64 MiB
ROW = 16 << 10
BATCH = 32


def held(path: Path) -> int:
    """Bytes of `path` in the page cache."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        pages = len(mapped) // mmap.PAGESIZE
        states = (ctypes.c_ubyte * pages)()
        view = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        failed = mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(mapped)), states)
        del view
    assert not failed, os.strerror(ctypes.get_errno())
    return sum(state & 1 for state in states) * mmap.PAGESIZE


def written(path: Path, most: int | None) -> DiskCache:
    cache = DiskCache(path, ROWS, SHAPE, "fp32")
    cache.pages.most = most
    values = torch.zeros(BATCH, *SHAPE)
    for start in range(0, ROWS, BATCH):
        values[:, 0, 0] = torch.arange(start, start + BATCH)
        cache.append(values, torch.zeros(BATCH, dtype=torch.int64))
        os.fdatasync(cache._file)  # so that no page waits for the disk when it is to be given up
    cache.seal()
    return cache


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is in its page cache")
@pytest.mark.parametrize("by_chunk", [False, True])
@pytest.mark.parametrize("most", [None, 20 << 20, 0])
def test_no_more_of_a_boundary_is_in_ram_than_may_be(tmp_path: Path, most: int | None, by_chunk: bool) -> None:
    path, all_of_it = tmp_path / "b", ROWS * ROW
    with written(path, most) as cache:
        cache.pages.by_chunk = by_chunk
        bound = all_of_it if most is None else most + (24 << 20)  # being written, read ahead, or of chunks in use
        assert held(path) <= bound
        out = torch.empty(BATCH, *SHAPE)
        for start in range(0, ROWS, BATCH):
            cache.read(range(start, start + BATCH), out)
        assert held(path) <= bound
        order = shuffled_by_chunk(ROWS, 64, 0) if by_chunk else shuffled(ROWS, 0)
        highest = 0
        for start in range(0, ROWS, BATCH):
            cache.ahead(order[start + BATCH : start + 2 * BATCH])
            cache.read(order[start : start + BATCH], out)
            assert out[:, 0, 0].tolist() == order[start : start + BATCH]
            if start % 1024 == 0:
                highest = max(highest, held(path))
        assert highest <= bound + (40 << 20 if by_chunk else 0)
        assert held(path) <= bound
        if most is None:
            assert held(path) > all_of_it // 2  # or else this test sees nothing
        elif most:
            assert held(path) >= most // 2


def test_chunks_are_asked_for_once_and_stay_while_they_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *rest: asked.append(rest), raising=False)
    row = 4 << 20
    pages = Pages(0, rows=7, row_bytes=row, chunk=2)
    pages.by_chunk, pages.most = True, row // 2

    def told(advice: int) -> list[tuple[float, float]]:
        found = [(offset / row, size / row) for offset, size, kind in asked if kind == advice]
        asked.clear()
        return found

    pages.ahead([3, 6])
    assert sum(size for _, size in told(os.POSIX_FADV_WILLNEED)) == 3  # the second and the last, which has one row
    pages.used(3 * row, row, in_order=False)
    assert told(os.POSIX_FADV_DONTNEED) == []
    pages.used(6 * row, row, in_order=False)
    assert told(os.POSIX_FADV_DONTNEED) == [(0.5, 1.5), (4, 2)]
    pages.ahead([2])
    assert told(os.POSIX_FADV_WILLNEED) == []
    pages.used(2 * row, 2 * row, in_order=False)
    assert told(os.POSIX_FADV_DONTNEED) == [(0.5, 1.5), (4, 3)]
    pages.ahead([0])
    pages.used(0, 2 * row, in_order=False)
    assert told(os.POSIX_FADV_DONTNEED) == [(2, 5)]
    pages.used(row, 2 * row, in_order=True)
    assert told(os.POSIX_FADV_DONTNEED) == [(0.5, 2.5)]


def test_large_rows_are_asked_for_in_pieces_that_a_kernel_reads_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, offset, size, advice: asked.append((offset, size)))
    Pages(0, rows=3, row_bytes=300_000, chunk=3).ahead([1])
    assert asked == [(300_000, 131_072), (431_072, 131_072), (562_144, 37_856)]
