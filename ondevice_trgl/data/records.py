"""Fixed-size uint8 records: few in memory, many in one raw file, read without mapping it.

A memory map counts as RSS once it is touched; `os.preadv` into a reused buffer does not, and is as fast.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.errors import DataError, StorageError

IN_MEMORY_BYTES = 8_000_000
"""Up to this many bytes of records stay in memory; more go to a file."""
CHUNK_BYTES = 256 * 1024
"""Records are streamed in pieces of about this size."""


def chunk_rows(record_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """How many records of that size go into one chunk; at least one."""
    return max(1, chunk_bytes // record_bytes)


def fill(file: BinaryIO, view: memoryview) -> int:
    """Read into `view` until it is full or the file ends; the number of bytes read."""
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])  # type: ignore[attr-defined]  # every binary file that is opened here has it
        if not got:
            break
        done += got
    return done


def stream_file(file: BinaryIO, count: int, record_bytes: int, *, what: str) -> Iterator[Tensor]:
    """`count` records from `file` in chunks of uint8 (n, record_bytes); each chunk is overwritten by the next.

    Raises DataError where the file ends early; `what` names it.
    """
    buffer = torch.empty(min(chunk_rows(record_bytes), max(count, 1)), record_bytes, dtype=torch.uint8)
    view = bytes_of(buffer)
    for start in range(0, count, len(buffer)):
        rows = min(len(buffer), count - start)
        got = fill(file, view[: rows * record_bytes])
        if got < rows * record_bytes:
            raise DataError(
                f"{what} is truncated: {count} records of {record_bytes} bytes expected,"
                f" it ends in record {start + got // record_bytes}",
                hint="fetch the file again",
            )
        yield buffer[:rows]


def open_scratch(scratch_dir: Path | None) -> BinaryIO:
    """A file without a name in `scratch_dir` (None: the system's temporary folder): it goes when it is closed.

    Raises StorageError where it cannot be made.
    """
    try:
        if scratch_dir is not None:
            scratch_dir.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=scratch_dir, buffering=0)
    except OSError as error:
        raise StorageError(
            f"cannot write to {scratch_dir or tempfile.gettempdir()}: {error.strerror}",
            hint="free some space there or choose another folder",
        ) from error


class Records(Protocol):
    """Where records are kept; `read` copies the records `slots` into `out`, uint8 (len(slots), record_bytes)."""

    def read(self, slots: list[int], out: Tensor) -> None: ...


class MemoryRecords:
    """Records in one uint8 tensor (n, record_bytes)."""

    def __init__(self, data: Tensor) -> None:
        self._data = data

    def read(self, slots: list[int], out: Tensor) -> None:
        torch.index_select(self._data, 0, torch.tensor(slots, dtype=torch.int64), out=out)


class FileRecords:
    """Records in a raw file, closed with this object. `out` must be contiguous."""

    def __init__(self, file: BinaryIO, record_bytes: int) -> None:
        self._file = file
        self._record_bytes = record_bytes

    def __del__(self) -> None:
        self._file.close()

    def read(self, slots: list[int], out: Tensor) -> None:
        """Raises StorageError where the file cannot be read in full."""
        view, size, descriptor = bytes_of(out), self._record_bytes, self._file.fileno()
        start = 0
        while start < len(slots):
            end = start + 1  # records that lie side by side are read at once
            while end < len(slots) and slots[end] == slots[end - 1] + 1:
                end += 1
            done, stop, offset = start * size, end * size, slots[start] * size
            while done < stop:
                try:
                    got = os.preadv(descriptor, [view[done:stop]], offset)
                except OSError as error:
                    raise StorageError(f"cannot read the scratch file of the dataset: {error.strerror}") from error
                if got == 0:
                    raise StorageError("the scratch file of the dataset is shorter than it was written")
                done, offset = done + got, offset + got
            start = end


def keep_records(
    stream: Iterable[Tensor],
    wanted: Tensor,
    record_bytes: int,
    *,
    scratch_dir: Path | None = None,
    digest: "hashlib.blake2b | None" = None,
) -> Records:
    """Keep the records at the positions `wanted` (int64, ascending) of `stream`; slot i holds `wanted[i]`.

    The stream is read to its end, so that a fault anywhere in it shows; what is kept goes into `digest`. Peak memory:
    the records, where they are at most IN_MEMORY_BYTES, else about two chunks. Raises StorageError where the file
    cannot be written.
    """
    if len(wanted) * record_bytes <= IN_MEMORY_BYTES:
        data = torch.empty(len(wanted), record_bytes, dtype=torch.uint8)
        for first, rows in _select(stream, wanted, digest):
            data[first : first + len(rows)] = rows
        return MemoryRecords(data)
    file = open_scratch(scratch_dir)
    try:
        for _, rows in _select(stream, wanted, digest):
            view = bytes_of(rows)
            while len(view):
                view = view[file.write(view) :]
    except OSError as error:
        file.close()
        need = len(wanted) * record_bytes
        raise StorageError(
            f"cannot write the {need} bytes of the dataset to {scratch_dir or tempfile.gettempdir()}: {error.strerror}",
            hint="free some space there, choose another folder, or lower the train limit",
        ) from error
    except BaseException:
        file.close()
        raise
    return FileRecords(file, record_bytes)


def hash_records(records: Records, wanted: Tensor, record_bytes: int, digest: "hashlib.blake2b") -> None:
    """Take the records at the positions `wanted` into `digest`, as `keep_records` does. Memory: a chunk."""
    buffer = torch.empty(min(chunk_rows(record_bytes), max(len(wanted), 1)), record_bytes, dtype=torch.uint8)
    for piece in torch.split(wanted, len(buffer)):
        rows = buffer[: len(piece)]
        records.read(piece.tolist(), rows)
        digest.update(bytes_of(rows))


def _select(stream: Iterable[Tensor], wanted: Tensor, digest: "hashlib.blake2b | None") -> Iterator[tuple[int, Tensor]]:
    """The wanted rows of each chunk, contiguous, with the slot of the first."""
    start = slot = 0
    for chunk in stream:
        stop = start + len(chunk)
        next_slot = int(torch.searchsorted(wanted, stop))
        if next_slot > slot:
            rows = chunk.contiguous() if next_slot - slot == len(chunk) else chunk[wanted[slot:next_slot] - start]
            if digest is not None:
                digest.update(bytes_of(rows))
            yield slot, rows
        start, slot = stop, next_slot
