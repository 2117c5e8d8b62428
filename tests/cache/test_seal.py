"""A boundary that outlives its process: taken up where it is whole and the right one, and what is damaged is found."""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from ondevice_trgl.cache.disk import DiskCache
from ondevice_trgl.cache.seal import CHUNK_BYTES, Checksums, Seal, chunk_rows, seal_of

SHAPE, ROWS = (3, 64, 64), 50
"""48 KiB a row, 21 rows a chunk."""
LABELS = torch.arange(ROWS)


def written(path: Path, dtype: str = "fp32", *, producer: str = "me", batch: int = 8) -> torch.Tensor:
    """Seal a boundary of random rows at `path`; returns them as they are read."""
    values = torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(0))
    cache = DiskCache(path, ROWS, SHAPE, dtype)
    for start in range(0, ROWS, batch):
        cache.append(values[start : start + batch], LABELS[start : start + batch])
    cache.seal(producer)
    out = torch.empty(ROWS, *SHAPE)
    cache.read(range(ROWS), out)
    cache.close(keep=True)
    return out


def found(path: Path, dtype: str = "fp32", **other: Any) -> DiskCache | None:
    wanted = {"producer": "me", "shape": SHAPE, "dtype": dtype, "labels": LABELS, **other}
    return DiskCache.sealed(path, **wanted)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_sealed_boundary_is_taken_up_as_it_was_written(dtype: str, tmp_path: Path) -> None:
    values = written(tmp_path / "b.bin", dtype)
    cache, out = found(tmp_path / "b.bin", dtype), torch.empty(ROWS, *SHAPE)
    assert cache is not None
    assert cache.damaged() == []
    assert torch.equal(cache.read(range(ROWS), out), LABELS)
    assert torch.equal(out, values)
    cache.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [
        {"producer": "another"},
        {"shape": (3, 64, 65)},
        {"shape": (64, 64, 3)},
        {"labels": LABELS[:-1]},
    ],
)
def test_a_foreign_boundary_is_not_taken_up(other: dict[str, Any], tmp_path: Path) -> None:
    written(tmp_path / "b.bin")
    assert found(tmp_path / "b.bin", **other) is None


def test_one_that_is_kept_narrower_is_not_taken_up_and_a_wider_one_is(tmp_path: Path) -> None:
    written(tmp_path / "b.bin", "bf16")
    assert found(tmp_path / "b.bin", "fp32") is None
    wider = found(tmp_path / "b.bin", "int8")
    assert wider is not None
    wider.close()


def test_one_that_was_not_sealed_or_is_being_written_anew_is_not_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "b.bin"
    written(path, producer="")
    assert not path.exists()  # nobody could take it up
    written(path)
    again = DiskCache(path, ROWS, SHAPE, "fp32")  # a process that is killed here leaves this
    assert found(path) is None
    again.close(keep=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [0, 20 * 49152 + 7, 21 * 49152, 50 * 49152 - 1])
def test_a_flipped_bit_is_found_and_its_chunk_mended(at: int, tmp_path: Path) -> None:
    path = tmp_path / "b.bin"
    values = written(path)
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    cache = found(path)
    assert cache is not None
    (rows,) = cache.damaged()
    assert at // 49152 in rows
    assert rows in (range(21), range(21, 42), range(42, 50))
    aside = DiskCache(tmp_path / "aside.bin", len(rows), SHAPE, "fp32")
    aside.append(values[rows.start : rows.stop], LABELS[: len(rows)])
    for position, row in enumerate(rows):
        cache.mend(row, aside, position)
    aside.close()
    assert cache.damaged() == []
    cache.close()


@pytest.mark.parametrize("size", [0, 49152 * 30, 49152 * 50 + 1])
def test_a_file_of_another_length_is_damaged_where_it_lacks_rows(size: int, tmp_path: Path) -> None:
    path = tmp_path / "b.bin"
    written(path)
    data = path.read_bytes()
    path.write_bytes((data + b"\0")[:size])
    cache = found(path)
    assert cache is not None
    damaged = [row for rows in cache.damaged() for row in rows]
    assert damaged == ([] if size > len(data) else [row for row in range(ROWS) if row >= size // 49152 // 21 * 21])
    cache.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        "[" * 100_000,
        '{"format": 1}',
        b"\xff\xfe".decode("latin1"),
    ],
)
def test_a_seal_that_is_none_is_as_good_as_no_seal(text: str, tmp_path: Path) -> None:
    path = tmp_path / "b.bin"
    written(path)
    seal_of(path).write_text(text, encoding="latin1")
    assert Seal.read(path) is None
    assert found(path) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", 2),
        ("checksums", [1]),
        ("checksums", ["a", "b", "c"]),
        ("rows", -1),
        ("rows", 1.5),
        ("chunk_rows", 0),
        ("shape", 3),
        ("more", 1),
    ],
)
def test_a_seal_with_other_values_is_as_good_as_none(name: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "b.bin"
    written(path)
    values = json.loads(seal_of(path).read_text())
    seal_of(path).write_text(json.dumps({**values, name: value}))
    assert Seal.read(path) is None


def test_checksums_are_of_chunks_however_the_bytes_come() -> None:
    data = bytes(range(256)) * 4
    expected = tuple(zlib.crc32(data[start : start + 100]) for start in range(0, 1000, 100))
    for size in (1, 99, 100, 101, 333, 1000):
        sums = Checksums(100)
        for start in range(0, 1000, size):
            sums.add(memoryview(data[start : min(1000, start + size)]))
        assert sums.all() == expected
    sums.add(memoryview(b"rest"))
    assert sums.all() == (*expected, zlib.crc32(b"rest"))


def test_a_chunk_is_about_a_megabyte_and_a_row_at_least() -> None:
    assert (chunk_rows(1), chunk_rows(CHUNK_BYTES), chunk_rows(10 * CHUNK_BYTES)) == (CHUNK_BYTES, 1, 1)
