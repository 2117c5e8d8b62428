"""The disk tier: one preallocated file of fixed-size rows, read with `pread` into a reused buffer.

Sealed, it outlives the process: a later one takes it up, or finds what is damaged of it (see `seal`).
No mmap: mapped pages count in RSS (a 128 MiB cache read that way cost +132 MiB of peak, `pread` +6).
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.cache.base import BoundaryCache
from ondevice_trgl.cache.codec import Codec
from ondevice_trgl.cache.memory import MemoryCache
from ondevice_trgl.cache.pages import Pages
from ondevice_trgl.cache.seal import Checksums, Seal, chunk_rows, damaged_chunks, seal_of
from ondevice_trgl.errors import DamagedFileError, StorageError
from ondevice_trgl.units import format_size


class DiskCache(BoundaryCache):
    """Rows in the file `path`, whose space is reserved before the first write.

    Memory: the labels; for formats but fp32 a megabyte, or a row, beside.
    Raises StorageError where the disk has too little room.
    """

    _seal: Seal | None = None

    def __init__(self, path: Path, rows: int, shape: tuple[int, ...], dtype: str) -> None:
        super().__init__(rows, shape, dtype)
        self.path = path
        size = rows * self.row_bytes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for old in (seal_of(path), path):  # the seal first; and a link is not written through
                old.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free
            if size > free:
                raise OSError(errno.ENOSPC, "No space left on device")
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._failed(error) from error
        try:
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(self._file, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                self.close()
                raise self._failed(error) from error
        self._chunk = chunk_rows(self.row_bytes)
        self._open()
        self._checksums = Checksums(self._chunk * self.row_bytes)

    @classmethod
    def moved(cls, path: Path, cache: MemoryCache) -> "DiskCache":
        """What is in `cache`, in the file `path` from now on; `cache` is closed. Raises StorageError, and keeps it."""
        found = cls(path, cache.rows, cache.shape, cache.dtype)
        try:
            for start, block in cache.blocks(found._chunk):
                found._write(start, block)
        except BaseException:
            found.close()
            raise
        found._as(cache)
        cache.close()
        return found

    @classmethod
    def sealed(
        cls, path: Path, producer: str, shape: tuple[int, ...], dtype: str, labels: Tensor
    ) -> "DiskCache | None":
        """The boundary that was sealed at `path`, of the samples of `labels`; None where that is no such one.

        It is kept as `dtype`, or wider. Its rows may be damaged, see `damaged`.
        """
        seal = Seal.read(path)
        if seal is None or seal.dtype not in Codec(dtype, shape).and_wider():
            return None
        row = Codec(seal.dtype, shape).row_bytes
        if (seal.producer, seal.rows, seal.shape, seal.chunk_rows) != (producer, len(labels), shape, chunk_rows(row)):
            return None
        found, size = cls.__new__(cls), len(labels) * row
        BoundaryCache.__init__(found, len(labels), shape, seal.dtype)
        try:
            found._file = os.open(path, os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
            if os.fstat(found._file).st_size != size:
                os.truncate(found._file, size)  # what is missing reads as zeros, which are no chunk's
        except OSError:
            return None
        found.path, found.labels, found._filled, found._chunk = path, labels, len(labels), seal.chunk_rows
        found._open()
        found._seal = seal
        return found

    def _open(self) -> None:
        # a buffer for rows as they are kept, of a chunk's size; not in memory before it is written to
        self._rows = torch.empty(self._chunk, self.row_bytes, dtype=torch.uint8)
        self.pages = Pages(self._file, self.rows, self.row_bytes, self._chunk)

    def seal(self, producer: str = "") -> None:
        """All rows are written; with `producer`, a later process may take them up. Raises StorageError."""
        super().seal()
        if producer:
            self._seal = Seal(producer, self.rows, self.shape, self.dtype, self._chunk, self._checksums.all())
            self._seal.write(self.path)

    def damaged(self) -> list[range]:
        """Of a sealed boundary, the rows in chunks that are not as they were written: every byte is read."""
        assert self._seal is not None
        chunks = damaged_chunks(self._file, self._seal, self.row_bytes)
        return [range(k * self._chunk, min(self.rows, (k + 1) * self._chunk)) for k in chunks]

    def mend(self, row: int, source: "DiskCache", source_row: int) -> None:
        """Write `row` anew, as it is in `source`, byte by byte. Raises StorageError, DamagedFileError."""
        data = bytearray(self.row_bytes)
        source._fill(memoryview(data), source_row * self.row_bytes)
        self._put(row, memoryview(data))

    def _failed(self, error: OSError) -> StorageError:
        needed = format_size(self.rows * self.row_bytes)
        return StorageError(
            f"cannot keep {self.rows} activations of {format_size(self.row_bytes)} ({needed}) in {self.path}: "
            f"{error.strerror}",
            hint="free some disk space, or choose another --cache-dir or a narrower --cache-dtype; then resume the run",
        )

    def _write(self, start: int, block: Tensor) -> None:
        self._put(start, bytes_of(block))
        self._checksums.add(bytes_of(block))
        self.pages.wrote((start + len(block)) * self.row_bytes)

    def _put(self, start: int, data: memoryview) -> None:
        offset = start * self.row_bytes
        try:
            while data:
                count = os.pwrite(self._file, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise self._failed(error) from error

    def _read(self, indices: Sequence[int], out: Tensor) -> None:
        # fp32 rows go straight into `out`, others through a few rows as they are kept
        if self.dtype == "fp32" and out.dtype == torch.float32 and out.is_contiguous() and out.device.type == "cpu":
            self._gather(indices, bytes_of(out))
            return
        for start in range(0, len(indices), len(self._rows)):
            part = indices[start : start + len(self._rows)]
            self._gather(part, bytes_of(self._rows))
            self.codec.decode(self._rows[: len(part)], out[start : start + len(part)])

    def _gather(self, indices: Sequence[int], target: memoryview) -> None:
        """Read rows into `target`, one behind the other; runs of neighbours (validation, caching) are one call."""
        position = 0
        while position < len(indices):
            first, run = indices[position], 1
            if isinstance(indices, range) and indices.step == 1:
                run = len(indices)
            while position + run < len(indices) and indices[position + run] == first + run:
                run += 1
            begin, end = position * self.row_bytes, (position + run) * self.row_bytes
            self._fill(target[begin:end], first * self.row_bytes)
            self.pages.used(first * self.row_bytes, end - begin, in_order=isinstance(indices, range))
            position += run

    def ahead(self, indices: Sequence[int]) -> None:
        """Have the kernel read these rows into memory that it can take back, while something else is computed."""
        self.pages.ahead(indices)

    def _fill(self, target: memoryview, offset: int) -> None:
        while target:
            try:
                count = os.preadv(self._file, [target], offset)
            except OSError as error:
                raise StorageError(f"cannot read {self.path}: {error.strerror}") from error
            if not count:
                raise DamagedFileError(f"{self.path} ends at byte {offset}", hint="delete it and resume the run")
            target, offset = target[count:], offset + count

    def close(self, *, keep: bool = False) -> None:
        if self._file < 0:
            return
        os.close(self._file)
        self._file = -1
        if keep and self._seal is not None:
            return
        with contextlib.suppress(OSError):  # the seal first: it must not outlive its rows
            seal_of(self.path).unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
