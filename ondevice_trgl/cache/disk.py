"""The disk tier: one preallocated file of fixed-size rows, read with `pread` into a reused buffer.

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
from ondevice_trgl.cache.base import DTYPES, BoundaryCache
from ondevice_trgl.errors import DamagedFileError, StorageError
from ondevice_trgl.units import format_size


class DiskCache(BoundaryCache):
    """Rows in the file `path`, whose space is reserved before the first write. Holds one row beside the labels.

    Raises StorageError where the disk has too little room.
    """

    def __init__(self, path: Path, rows: int, shape: tuple[int, ...], dtype: str) -> None:
        super().__init__(rows, shape, dtype)
        self.path = path
        size = rows * self.row_bytes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
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
        self._row = torch.empty(shape, dtype=DTYPES[dtype]) if dtype != "fp32" else None

    def _failed(self, error: OSError) -> StorageError:
        needed = format_size(self.rows * self.row_bytes)
        return StorageError(
            f"cannot keep {self.rows} activations of {format_size(self.row_bytes)} ({needed}) in {self.path}: "
            f"{error.strerror}",
            hint="free some disk space, or choose another --cache-dir or a narrower --cache-dtype; then resume the run",
        )

    def _write(self, start: int, block: Tensor) -> None:
        data, offset = bytes_of(block), start * self.row_bytes
        try:
            while data:
                count = os.pwrite(self._file, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise self._failed(error) from error

    def _read(self, indices: Sequence[int], out: Tensor) -> None:
        # fp32 rows go straight into `out`, narrower ones through one row of their own dtype; runs of neighbouring
        # rows (validation, caching) become one call
        if self._row is None and out.dtype == torch.float32 and out.is_contiguous() and out.device.type == "cpu":
            target, position = bytes_of(out), 0
            while position < len(indices):
                run = 1
                while position + run < len(indices) and indices[position + run] == indices[position] + run:
                    run += 1
                begin, end = position * self.row_bytes, (position + run) * self.row_bytes
                self._fill(target[begin:end], indices[position] * self.row_bytes)
                position += run
            return
        row = self._row if self._row is not None else torch.empty(self.shape, dtype=DTYPES[self.dtype])
        for position, index in enumerate(indices):
            self._fill(bytes_of(row), index * self.row_bytes)
            out[position].copy_(row)

    def _fill(self, target: memoryview, offset: int) -> None:
        while target:
            try:
                count = os.preadv(self._file, [target], offset)
            except OSError as error:
                raise StorageError(f"cannot read {self.path}: {error.strerror}") from error
            if not count:
                raise DamagedFileError(f"{self.path} ends at byte {offset}", hint="delete it and resume the run")
            target, offset = target[count:], offset + count

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
