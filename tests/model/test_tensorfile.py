"""Safetensors files: interchangeable with the library's, and never trusted."""

import errno
import json
import os
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ondevice_trgl.errors import DamagedFileError, StorageError
from ondevice_trgl.model.header import read_header
from ondevice_trgl.model.tensorfile import copy_tensors, read_tensors, write_tensors

Tensors = dict[str, Tensor]


@pytest.fixture
def tensors() -> Tensors:
    return {
        "weight": torch.randn(3, 5),
        "brain": torch.randn(2, 3).to(torch.bfloat16),
        "count": torch.tensor(7),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "mask": torch.tensor([True, False, True]),
        "half": torch.randn(7).half(),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }


def same(one: Tensors, two: Tensors) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and one[name].shape == two[name].shape and torch.equal(one[name], two[name])
        for name in one
    )


def test_the_library_reads_what_is_written(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    written = write_tensors(path, tensors, {"position": "{}"})
    assert same(load_file(path), tensors)
    assert written == path.stat().st_size
    assert read_header(path)[1].keys() == {"position", "crc32"}
    assert read_header(path)[1]["position"] == "{}"


def test_what_the_library_writes_is_read(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file(tensors, path, {"by": "library"})
    assert same(read_tensors(path), tensors)


def test_gaps_in_memory_do_not_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    square = torch.arange(12.0).reshape(3, 4)
    write_tensors(path, {"t": square.t(), "s": square[:, ::2].requires_grad_()})
    assert same(read_tensors(path), {"t": square.t().contiguous(), "s": square[:, ::2].contiguous().detach()})


def test_no_tensor_at_all_is_a_file_too(tmp_path: Path) -> None:
    write_tensors(tmp_path / "none", {})
    assert read_tensors(tmp_path / "none") == {}
    assert load_file(tmp_path / "none") == {}


def test_only_wanted_tensors_are_read_each_into_memory_of_its_own(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_tensors(path, tensors)
    read = read_tensors(path, lambda name: name in ("weight", "half"))
    assert same(read, {name: tensors[name] for name in ("weight", "half")})
    assert read["weight"].untyped_storage().nbytes() == 60


def test_copies_by_new_names_from_several_files(tensors: Tensors, tmp_path: Path) -> None:
    big = torch.randn(3 << 17)  # more than one block
    write_tensors(tmp_path / "a", tensors)
    write_tensors(tmp_path / "b", {"big": big, "weight": -tensors["weight"]})
    copy_tensors(
        tmp_path / "c",
        {"x": (tmp_path / "b", "big"), "y": (tmp_path / "a", "weight"), "z": (tmp_path / "a", "empty")},
    )
    assert same(load_file(tmp_path / "c"), {"x": big, "y": tensors["weight"], "z": tensors["empty"]})


def test_a_copy_from_a_file_cut_meanwhile_leaves_nothing_behind(tmp_path: Path, monkeypatch: Any) -> None:
    source = tmp_path / "a"
    write_tensors(source, {"x": torch.randn(100)})

    def cut(path: Path) -> Any:
        header = read_header(path)
        os.truncate(path, path.stat().st_size - 8)
        return header

    monkeypatch.setattr("ondevice_trgl.model.tensorfile.read_header", cut)
    with pytest.raises(DamagedFileError, match="ends early"):
        copy_tensors(tmp_path / "b", {"x": (source, "x")})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", b""),
        (b"{", b""),
        (b"\xff\xfe{}", b""),
        ([], b""),
        (5, b""),
        ({"x": 5}, b""),
        ({"x": {}}, b""),
        ({"__metadata__": 5}, b""),
        (entry(), b"1234567"),
        (entry(), b"123456789"),
        (entry(dtype="F9"), b"12345678"),
        (entry(shape=[3]), b"12345678"),
        (entry(shape=[10**12, 10**12]), b"12345678"),
        (entry(shape=[-1, -2]), b"12345678"),
        (entry(shape="2"), b"12345678"),
        (entry(shape=[2.0]), b"12345678"),
        (entry(shape=[2**62]), b"12345678"),
        (entry(shape=[2**62, 4, 0], offsets=[0, 0]), b""),
        (entry(shape=[0] * 65, offsets=[0, 0]), b""),
        (entry(shape=[True, 2]), b"12345678"),
        (entry(dtype=["F32"]), b"12345678"),
        (entry(offsets=[0, True]), b"12345678"),
        (entry(offsets=[8, 0], shape=[-2]), b"12345678"),
        (entry(offsets=[8, 16]), b"1234567812345678"),
        ({**entry(), **{"y": entry()["x"]}}, b"12345678"),
        ({**entry(), **{"y": entry(offsets=(4, 12))["x"]}}, b"123456781234"),
        ({**entry(), **{"y": entry(offsets=(12, 20))["x"]}}, b"12345678123456781234"),
        ({"x": {**entry()["x"], "more": 1}}, b"12345678"),
        ({**entry(), "__metadata__": {"a": 1}}, b"12345678"),
        (
            b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            b"12345678",
        ),
        (b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', b"12345678"),
        (b'{"x":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', b"12345678"),
        (b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', b"12345678"),
        (entry(offsets=[-8, 0]), b""),
        (entry(offsets=["0", "8"]), b"12345678"),
        (entry(offsets=[]), b""),
        (b"[" * 100_000, b""),
    ],
)
def test_garbage_is_damage(tmp_path: Path, header: Any, data: bytes) -> None:
    path = write_raw(tmp_path / "bad", header, data)
    with pytest.raises(DamagedFileError, match="bad"):
        read_tensors(path)


@pytest.mark.parametrize("length", [0, 1, 3, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_is_not_true_is_damage(tmp_path: Path, length: int) -> None:
    with pytest.raises(DamagedFileError):
        read_tensors(write_raw(tmp_path / "bad", {}, length=length))


def test_a_missing_file_and_a_folder_are_damage(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match="is missing"):
        read_tensors(tmp_path / "absent")
    with pytest.raises(DamagedFileError):
        read_tensors(tmp_path)


@given(cut=st.integers(0, 200))
def test_a_file_torn_anywhere_is_damage(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "t"
    size = write_tensors(path, {"a": torch.arange(6.0), "b": torch.arange(3)})
    os.truncate(path, min(cut, size - 1))
    with pytest.raises(DamagedFileError):
        read_tensors(path)


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_damage(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "t"
    path.write_bytes(struct.pack("<Q", min(len(data), 20)) + data)
    with pytest.raises(DamagedFileError):
        read_tensors(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_a_storage_error_that_leaves_the_old_file(tmp_path: Path, monkeypatch: Any, call: str) -> None:
    path = tmp_path / "t"
    write_tensors(path, {"x": torch.ones(3)})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full) if call == "fsync" else monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        write_tensors(path, {"x": torch.zeros(3)})
    assert "disk space" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert same(read_tensors(path), {"x": torch.ones(3)})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_takes_no_byte_is_a_storage_error(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("ondevice_trgl.model.tensorfile.fresh", lambda path: open("/dev/full", "wb", buffering=0))  # noqa: PTH123, SIM115
    with pytest.raises(StorageError):
        write_tensors(tmp_path / "t", {"x": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: Any) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "t", {"x": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("parent", ["absent", "file"])
def test_a_folder_that_is_not_there_is_a_storage_error(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        write_tensors(tmp_path / parent / "t", {"x": torch.ones(3)})


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: Any) -> None:
    import ondevice_trgl.model.tensorfile as module

    monkeypatch.setattr(
        module, "_write_all", lambda write, data, whole=module._write_all: whole(lambda rest: write(rest[:7]), data)
    )
    values = torch.randn(100)
    write_tensors(tmp_path / "t", {"x": values})
    assert same(load_file(tmp_path / "t"), {"x": values})


def test_a_large_tensor_is_written_in_pieces_and_each_is_told(tmp_path: Path) -> None:
    tensors = {"large": torch.arange(5 << 20, dtype=torch.float32), "small": torch.ones(3), "none": torch.empty(0)}
    sizes: list[int] = []
    write_tensors(tmp_path / "t", tensors, written=lambda: sizes.append((tmp_path / ".t.tmp").stat().st_size))
    assert len(sizes) == 4
    assert sizes == sorted(set(sizes))
    assert max(after - before for before, after in pairwise([0, *sizes])) < 10_000_000
    assert sizes[-1] == (tmp_path / "t").stat().st_size
    found = read_tensors(tmp_path / "t")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
