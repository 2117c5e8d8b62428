"""Safetensors files written and read tensor by tensor, straight from and into the tensors' own memory.

The safetensors library maps the file (the pages count in RSS) and copies every tensor to bytes before it writes;
these two functions hold nothing beside the tensors themselves. The format is the library's own; the metadata have a
checksum of each tensor besides, which is looked at when the tensor is read.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ondevice_trgl.bounded import fresh, opened
from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.durable import sync
from ondevice_trgl.errors import DamagedFileError, StorageError
from ondevice_trgl.model.header import MOST_HEADER_BYTES, Entry, as_metadata, checksums, header_of, read_header

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_PIECE_BYTES = 8 << 20


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    written: Callable[[], None] | None = None,
    before: Path | None = None,
) -> int:
    """Write `tensors` to `path` atomically and durably; returns the bytes written.

    Written beside `path`, flushed to the disk, renamed over it. `written` is called behind every few megabytes, for
    tensors that can leave memory then. What was in `path` is found in `before` from then on, where that is given.
    Raises StorageError where the disk fails or is full.
    """
    entries = {name: (_NAMES[t.dtype], list(t.shape), t.numel() * t.element_size()) for name, t in tensors.items()}

    def blocks() -> Iterator[tuple[str, memoryview]]:
        for name, tensor in tensors.items():
            block = bytes_of(tensor.detach().cpu().contiguous())
            for start in range(0, len(block), _PIECE_BYTES):
                yield name, block[start : start + _PIECE_BYTES]
                if written is not None:
                    written()

    return _write(path, entries, blocks(), metadata, before)


def copy_tensors(path: Path, sources: Mapping[str, tuple[Path, str]], metadata: Mapping[str, str] | None = None) -> int:
    """Write `path` from tensors of other files, by new name: (file, name there), a megabyte in memory at a time.

    Atomic and durable as `write_tensors`. Raises StorageError, DamagedFileError.
    """
    headers = {file: read_header(file) for file in {file for file, _ in sources.values()}}
    entries = {}
    for name, (file, old) in sources.items():
        entry = headers[file][0][old]
        begin, end = entry["data_offsets"]
        entries[name] = (entry["dtype"], entry["shape"], end - begin)

    def blocks() -> Iterator[tuple[str, bytes]]:
        for name, (file, old) in sources.items():
            header, _, start = headers[file]
            for block in _blocks(file, start, *header[old]["data_offsets"]):
                yield name, block

    return _write(path, entries, blocks(), metadata)


def digest_tensors(path: Path, names: Iterable[str]) -> str:
    """A digest of those tensors of `path` that are among `names`: names, types, shapes and values.

    A megabyte in memory at a time. Raises DamagedFileError.
    """
    header, _, start = read_header(path)
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(header.keys() & set(names)):
        entry = header[name]
        digest.update(f"{name} {entry['dtype']} {entry['shape']}\n".encode())
        for block in _blocks(path, start, *entry["data_offsets"]):
            digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path, start: int, begin: int, end: int) -> Iterator[bytes]:
    """Bytes `begin` to `end` of what begins at `start` of the file, a megabyte at a time."""
    with opened(path) as source:
        source.seek(start + begin)
        while begin < end:
            block = source.read(min(end - begin, 1 << 20))
            if not block:
                raise DamagedFileError(f"{path} ends early")
            begin += len(block)
            yield block


def _write(
    path: Path,
    entries: Mapping[str, tuple[str, list[int], int]],
    blocks: Iterable[tuple[str, bytes | memoryview]],
    metadata: Mapping[str, str] | None,
    before: Path | None = None,
) -> int:
    sums, known = dict.fromkeys(entries, 0), dict(metadata or {})
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = _text(header, known, sums)
    if len(text) > MOST_HEADER_BYTES:
        raise StorageError(f"cannot write {path}: its header would be {len(text)} bytes, {MOST_HEADER_BYTES} at most")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with fresh(temporary) as file:
            _write_all(file.write, len(text).to_bytes(8, "little") + text)
            for name, block in blocks:
                _write_all(file.write, block)
                sums[name] = zlib.crc32(block, sums[name])
            file.seek(8)
            _write_all(file.write, _text(header, known, sums))  # of as many bytes as before
            os.fsync(file.fileno())
        if before is not None:
            keep(path, before)
        temporary.replace(path)
        sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise StorageError(
            f"cannot write {path}: {error.strerror}", hint="free some disk space, then resume the run"
        ) from error
    return 8 + len(text) + offset


def _text(header: Mapping[str, Any], metadata: Mapping[str, str], sums: Mapping[str, int]) -> bytes:
    own = {**metadata, **as_metadata(sums, header, metadata)}
    text = json.dumps({"__metadata__": own, **header}, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def keep(path: Path, before: Path) -> None:
    """Let what is in `path` be in `before`, and if it can be in `path` until another takes its place."""
    link = before.with_name(f".{before.name}.tmp")
    try:
        link.unlink(missing_ok=True)
        link.hardlink_to(path)
    except FileNotFoundError:
        return  # there is none yet
    except OSError:  # no links on this disk
        path.replace(before)
        return
    link.replace(before)
    link.unlink(missing_ok=True)  # one name of a file does not replace another of the same


def _write_all(write: Callable[[memoryview], int | None], data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[write(rest) or 0 :]


def read_tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of `path` whose names are `wanted`, each read into memory of its own.

    Raises DamagedFileError, also where one is not as it was written.
    """
    tensors: dict[str, Tensor] = {}
    try:
        with opened(path) as file:
            header, metadata, start = header_of(file)
            sums = checksums(header, metadata)
            for name, entry in header.items():
                if wanted(name):
                    tensors[name] = _filled(file, start + entry["data_offsets"][0], name, entry)
                    if name in sums and zlib.crc32(bytes_of(tensors[name])) != sums[name]:
                        raise ValueError(f"{name} is not as it was written")
    except FileNotFoundError:
        raise DamagedFileError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error
    return tensors


def verify(path: Path) -> None:
    """Read all of `path`, a megabyte at a time. Raises DamagedFileError where a byte is not as it was written."""
    header, metadata, start = read_header(path)
    try:
        sums = checksums(header, metadata)
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error
    for name, entry in header.items():
        found = 0
        for block in _blocks(path, start, *entry["data_offsets"]):
            found = zlib.crc32(block, found)
        if name in sums and found != sums[name]:
            raise DamagedFileError(f"{path} is damaged: {name} is not as it was written")


def _filled(file: BinaryIO, start: int, name: str, entry: Entry) -> Tensor:
    tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
    target = bytes_of(tensor)
    file.seek(start)
    while target:
        count = file.readinto(target)  # type: ignore[attr-defined]  # every binary file that is opened here has it
        if not count:
            raise ValueError(f"{name} ends early")
        target = target[count:]
    return tensor
