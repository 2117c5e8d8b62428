"""Boundary caches: what was written is read, in any order, and everything is given back."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ondevice_trgl.cache.base import BoundaryCache
from ondevice_trgl.cache.codec import row_bytes
from ondevice_trgl.cache.disk import DiskCache
from ondevice_trgl.cache.memory import MemoryCache
from ondevice_trgl.errors import DamagedFileError, StorageError

ROWS, SHAPE = 11, (2, 3)
Make = Callable[[str], BoundaryCache]


@pytest.fixture(params=["memory", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    if request.param == "memory":
        return lambda dtype: MemoryCache(ROWS, SHAPE, dtype)
    return lambda dtype: DiskCache(tmp_path / "deep" / "b.bin", ROWS, SHAPE, dtype)


def filled(cache: BoundaryCache) -> Tensor:
    values = torch.randn(ROWS, *SHAPE)
    for start in range(0, ROWS, 4):
        cache.append(values[start : start + 4], torch.arange(start, min(start + 4, ROWS)) * 10)
    cache.seal()
    return values


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "indices", [list(range(ROWS)), [10, 0, 5], [3, 4, 5, 9, 10, 0, 1], [7, 7, 8, 7], [10], [], range(2, 6)]
)
def test_rows_are_read_in_any_order(make: Make, dtype: str, indices: list[int]) -> None:
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    with make(dtype) as cache:
        values = filled(cache).to(torch_dtype).to(torch.float32)
        out = torch.full((len(indices) + 2, *SHAPE), -5.0)
        labels = cache.read(indices, out)
        assert labels.tolist() == [10 * index for index in indices]
        assert torch.equal(out[: len(indices)], values[list(indices)])
        assert bool((out[len(indices) :] == -5.0).all())


@given(indices=st.lists(st.integers(0, ROWS - 1), max_size=12))
def test_disk_and_memory_agree(tmp_path_factory: pytest.TempPathFactory, indices: list[int]) -> None:
    values = torch.arange(ROWS * 6.0).reshape(ROWS, *SHAPE)
    outs = []
    folder = tmp_path_factory.mktemp("cache")
    for cache in (MemoryCache(ROWS, SHAPE, "fp32"), DiskCache(folder / "b", ROWS, SHAPE, "fp32")):
        with cache:
            cache.append(values, torch.arange(ROWS))
            outs.append(torch.zeros(12, *SHAPE))
            cache.read(indices, outs[-1])
    assert torch.equal(*outs)
    assert torch.equal(outs[0][: len(indices)], values[indices])


def test_neighbours_are_one_read(tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[int] = []
    pread = os.preadv

    def counted(file: int, buffers: Any, offset: int) -> int:
        calls.append(len(buffers[0]))
        return pread(file, buffers, offset)

    with DiskCache(tmp_path / "b", ROWS, SHAPE, "fp32") as cache:
        filled(cache)
        monkeypatch.setattr(os, "preadv", counted)
        cache.read([2, 3, 4, 8, 9, 1], torch.empty(6, *SHAPE))
    assert calls == [3 * 24, 2 * 24, 24]


def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: Any) -> None:
    pread, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: pread(file, [buffers[0][:7]], at))
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[:5], at))
    with DiskCache(tmp_path / "b", ROWS, SHAPE, "fp32") as cache:
        values, out = filled(cache), torch.empty(ROWS, *SHAPE)
        cache.read(range(ROWS), out)
        assert torch.equal(out, values)


def test_a_target_of_another_dtype_is_converted(make: Make) -> None:
    with make("fp32") as cache:
        values, out = filled(cache), torch.empty(2, *SHAPE, dtype=torch.float64)
        cache.read([4, 2], out)
        assert torch.equal(out, values[[4, 2]].double())


def test_traffic_is_counted_in_stored_bytes(make: Make) -> None:
    with make("bf16") as cache:
        filled(cache)
        cache.read([0, 1, 1], torch.empty(3, *SHAPE))
        assert cache.bytes_written == ROWS * 12
        assert cache.bytes_read == 3 * 12
        assert cache.row_bytes == row_bytes(SHAPE, "bf16") == 12


def test_a_gradient_is_not_kept_with_the_rows(make: Make) -> None:
    with make("fp32") as cache:
        cache.append(torch.randn(ROWS, *SHAPE, requires_grad=True) * 2, torch.zeros(ROWS))
        out = torch.empty(1, *SHAPE)
        cache.read([0], out)
        assert not out.requires_grad


def test_a_cache_that_is_not_full_cannot_be_sealed(make: Make) -> None:
    with make("fp32") as cache:
        cache.append(torch.randn(3, *SHAPE), torch.zeros(3))
        with pytest.raises(AssertionError):
            cache.seal()


def test_closing_deletes_the_file_and_may_be_done_twice(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "b", ROWS, SHAPE, "fp32")
    filled(cache)
    assert (tmp_path / "b").stat().st_size == ROWS * 24
    cache.close()
    cache.close()
    assert list(tmp_path.iterdir()) == []


def test_closing_after_an_error_deletes_the_file(tmp_path: Path) -> None:
    def use() -> None:
        with DiskCache(tmp_path / "b", ROWS, SHAPE, "fp32"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert list(tmp_path.iterdir()) == []


def full(*_: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def assert_says_how_much_and_what_to_do(error: StorageError) -> None:
    assert "11 activations" in error.message
    assert "No space left on device" in error.message
    for way in ("disk space", "--cache-dir", "--cache-dtype", "resume"):
        assert way in error.hint


@pytest.mark.parametrize("call", ["posix_fallocate", "open"])
def test_a_disk_too_small_is_refused_before_the_first_row(tmp_path: Path, monkeypatch: Any, call: str) -> None:
    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError) as caught:
        DiskCache(tmp_path / "b", ROWS, SHAPE, "fp32")
    assert_says_how_much_and_what_to_do(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_too_little_free_space_is_refused_before_the_file_is_made(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, ROWS * 24 - 1))
    with pytest.raises(StorageError) as caught:
        DiskCache(tmp_path / "b", ROWS, SHAPE, "fp32")
    assert_says_how_much_and_what_to_do(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_writing_is_a_storage_error(tmp_path: Path, monkeypatch: Any) -> None:
    with DiskCache(tmp_path / "b", ROWS, SHAPE, "fp32") as cache:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(StorageError) as caught:
            cache.append(torch.randn(2, *SHAPE), torch.zeros(2))
        assert_says_how_much_and_what_to_do(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_space_still_caches(tmp_path: Path, monkeypatch: Any, number: int) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with DiskCache(tmp_path / "b", ROWS, SHAPE, "fp32") as cache:
        values, out = filled(cache), torch.empty(1, *SHAPE)
        cache.read([6], out)
        assert torch.equal(out[0], values[6])


def test_a_file_cut_behind_our_back_is_damage(tmp_path: Path) -> None:
    with DiskCache(tmp_path / "b", ROWS, SHAPE, "fp32") as cache:
        filled(cache)
        os.truncate(tmp_path / "b", 5 * 24)
        with pytest.raises(DamagedFileError, match="ends at byte 120"):
            cache.read([4, 5], torch.empty(2, *SHAPE))


def test_a_failing_disk_is_a_storage_error(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with DiskCache(tmp_path / "b", ROWS, SHAPE, "fp32") as cache:
        filled(cache)
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(StorageError, match="Input/output error"):
            cache.read([0], torch.empty(1, *SHAPE))


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        DiskCache(tmp_path / "file" / "b", ROWS, SHAPE, "fp32")


def test_the_memory_tier_gives_its_memory_back() -> None:
    cache = MemoryCache(ROWS, SHAPE, "fp32")
    filled(cache)
    cache.close()
    assert cache._data.untyped_storage().nbytes() == 0


def test_rows_are_asked_for_ahead_of_their_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *rest: asked.append(rest), raising=False)
    with DiskCache(tmp_path / "b", ROWS, SHAPE, "bf16") as cache:
        filled(cache)
        cache.ahead([7, 2])
    assert asked == [(7 * 12, 12, os.POSIX_FADV_WILLNEED), (2 * 12, 12, os.POSIX_FADV_WILLNEED)]
    MemoryCache(ROWS, SHAPE, "fp32").ahead([7, 2])  # nothing to be done, and no error
