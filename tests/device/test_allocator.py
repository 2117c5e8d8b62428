"""The allocator: named rightly, gives memory back, and stays quiet where there is nothing to do."""

import ctypes.util
from collections.abc import Callable

import pytest

from ondevice_trgl.device import allocator

GLIBC = allocator.glibc_version() is not None
NOT_GLIBC = "needs glibc's own malloc"

FREE_SMALL_BLOCKS = """
import ctypes
from ondevice_trgl.device import allocator
from ondevice_trgl.device.meter import SamplingRssMeter

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
size, count = {size}, {count}
{before}
with SamplingRssMeter() as meter:
    start = meter.current_bytes()
    blocks = [libc.malloc(size) for _ in range(count)]
    pin = libc.malloc(size)  # the last block stays, so that the heap cannot shrink from its top
    for block in blocks:
        libc.memset(block, 1, size)
    full = meter.current_bytes() - start
    for block in blocks:
        libc.free(block)
    freed = meter.current_bytes() - start
    allocator.release_memory()
    print(allocator.allocator_name(), full, freed, meter.current_bytes() - start)
"""


def measure(run_python: Callable[..., str], *, size: int, count: int, before: str = "", preload: str = "") -> list[str]:
    source = FREE_SMALL_BLOCKS.format(size=size, count=count, before=before)
    return run_python(source, **({"LD_PRELOAD": preload} if preload else {})).split()


@pytest.mark.skipif(not GLIBC, reason=NOT_GLIBC)
def test_release_gives_back_what_glibc_keeps(run_python: Callable[..., str]) -> None:
    name, *figures = measure(run_python, size=60_000, count=1000)
    full, freed, released = map(int, figures)
    assert name == "glibc"
    assert full > 50e6
    assert freed > 0.5 * full, "glibc returned the memory by itself: the test proves nothing"
    assert released < 0.1 * full


@pytest.mark.skipif(not GLIBC, reason=NOT_GLIBC)
def test_a_low_threshold_returns_blocks_as_they_are_freed(run_python: Callable[..., str]) -> None:
    before = "assert allocator.set_mmap_threshold(1 << 16, trim_threshold_bytes=1 << 16, max_arenas=2)"
    _, *figures = measure(run_python, size=90_000, count=600, before=before)
    full, freed, _ = map(int, figures)
    assert full > 50e6
    assert freed < 0.1 * full


@pytest.mark.parametrize(("refused", "expected"), [(0, True), (allocator.M_MMAP_THRESHOLD, False)])
def test_a_refused_value_is_told_and_keeps_no_other_from_being_set(
    refused: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []

    def mallopt(parameter: int, value: int) -> int:
        calls.append((parameter, value))
        return int(parameter != refused)

    monkeypatch.setattr(allocator, "_function", lambda *_: mallopt)
    monkeypatch.setattr(allocator, "allocator_name", lambda: "glibc")
    assert allocator.set_mmap_threshold(7, trim_threshold_bytes=8, max_arenas=1) is expected
    assert calls == [(-3, 7), (-1, 8), (-8, 1)]  # the numbers of M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX
    calls.clear()
    allocator.set_mmap_threshold(9)
    assert calls == [(-3, 9)]


@pytest.mark.parametrize("library", ["tcmalloc_minimal", "jemalloc", "mimalloc"])
def test_a_preloaded_allocator_is_recognised(library: str, run_python: Callable[..., str]) -> None:
    path = ctypes.util.find_library(library)
    if path is None:
        pytest.skip(f"lib{library} is not installed")
    name, *figures = measure(run_python, size=60_000, count=1000, preload=path)
    full, freed, released = map(int, figures)
    assert name == library.removesuffix("_minimal")
    assert released <= freed
    if name == "tcmalloc":
        assert released < 0.3 * full


@pytest.mark.parametrize(
    ("provider", "glibc", "expected"),
    [
        ("libc.so.6", "2.36", "glibc"),
        ("libtcmalloc_minimal.so.4", "2.36", "tcmalloc"),
        ("libjemalloc.so.2", "2.36", "jemalloc"),
        ("libmimalloc.so.3", None, "mimalloc"),
        ("ld-musl-x86_64.so.1", None, "unknown"),
        ("libc.so.6", None, "unknown"),
        ("libsystem_malloc.dylib", None, "unknown"),
        ("", "2.36", "unknown"),
    ],
)
def test_the_library_that_answers_malloc_decides(
    provider: str, glibc: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocator, "_library_of", lambda symbols, symbol: provider)
    monkeypatch.setattr(allocator, "glibc_version", lambda: glibc)
    assert allocator.allocator_name() == expected


def test_without_a_c_library_to_talk_to_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_symbols", lambda: None)
    assert allocator.allocator_name() == "unknown"
    assert allocator.glibc_version() is None
    assert allocator.set_mmap_threshold(1 << 18) is False
    allocator.release_memory()


def test_release_empties_the_cuda_cache_only_where_cuda_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    allocator.release_memory()
    assert emptied == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    allocator.release_memory()
    assert emptied == [True]
