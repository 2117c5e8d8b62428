"""The seal of a boundary on disk: what it is, whose it is, and a checksum a chunk; written last, behind all rows.

A boundary without a seal is not whole. Rows are not flushed to the disk before it is written, as that would wait for
gigabytes: what a power cut took is found by the checksums.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ondevice_trgl.bounded import parse_object, read_bytes
from ondevice_trgl.durable import write_text
from ondevice_trgl.typed import record_of

FORMAT = 1
CHUNK_BYTES = 1 << 20
_MOST_BYTES = 16 << 20
"""Of a seal's file: a million chunks."""


@dataclass(frozen=True)
class Seal:
    """Of `rows` samples of `shape` kept as `dtype`, put out by `producer`: a digest of data, weights and buffers."""

    producer: str
    rows: int
    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    checksums: tuple[int, ...]
    """CRC-32 of each chunk of `chunk_rows` rows; the last may be shorter."""
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """Write the seal of the boundary `path`, atomically. Raises StorageError."""
        write_text(seal_of(path), json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "Seal | None":
        """The seal of the boundary `path`; None where there is none, or it is not what this program wrote."""
        try:
            seal = record_of(cls, parse_object(read_bytes(seal_of(path), most=_MOST_BYTES)))
        except (OSError, ValueError):
            return None
        return seal if seal.format == FORMAT and seal._is_sound() else None

    def _is_sound(self) -> bool:
        numbers = (self.rows, self.chunk_rows, *self.shape, *self.checksums)
        if min(numbers) < 0 or not self.chunk_rows:
            return False
        return len(self.checksums) == -(-self.rows // self.chunk_rows)


def seal_of(path: Path) -> Path:
    """The file of the seal of the boundary `path`."""
    return path.with_suffix(".json")


def chunk_rows(row_bytes: int) -> int:
    """Rows of a chunk: about a megabyte."""
    return max(1, CHUNK_BYTES // max(1, row_bytes))


class Checksums:
    """CRC-32 of every `chunk` bytes of what is added in order. Memory: eight bytes a chunk."""

    def __init__(self, chunk: int) -> None:
        self._done: list[int] = []
        self._chunk, self._now, self._left = chunk, 0, chunk

    def add(self, data: memoryview) -> None:
        """The next bytes."""
        while data:
            part = data[: self._left]
            self._now = zlib.crc32(part, self._now)
            self._left -= len(part)
            data = data[len(part) :]
            if not self._left:
                self._done.append(self._now)
                self._now, self._left = 0, self._chunk

    def all(self) -> tuple[int, ...]:
        """Of every chunk so far, the last as far as it goes."""
        return (*self._done, self._now) if self._left < self._chunk else tuple(self._done)


def damaged_chunks(file: int, seal: Seal, row_bytes: int) -> Iterator[int]:
    """Numbers of the chunks of the open `file` that are not as `seal` says. Memory: one chunk."""
    size = seal.chunk_rows * row_bytes
    buffer = memoryview(bytearray(min(size, seal.rows * row_bytes)))
    for number, expected in enumerate(seal.checksums):
        wanted = min(size, seal.rows * row_bytes - number * size)
        filled = 0
        while filled < wanted:
            try:
                count = os.preadv(file, [buffer[filled:wanted]], number * size + filled)
            except OSError:
                count = 0  # a sector that cannot be read is as good as lost
            if not count:
                break
            filled += count
        if filled < wanted or zlib.crc32(buffer[:wanted]) != expected:
            yield number
