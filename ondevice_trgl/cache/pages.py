"""What the kernel holds of a boundary's file in RAM: read before it is needed, and given up where others need the room.

Pages of a file count in no process, and the kernel takes them back; but a boundary that is larger than what is free
pushes out an app's pages before its own. So the first bytes of the file may stay, and what lies behind them is given
up once it was used: of an epoch in any order, that much is in RAM, and no other page was lost for it.
"""

import os
from collections.abc import Iterable

_AHEAD_BYTES = 128 << 10
"""The least that a kernel reads ahead at a time unless it is told otherwise; of more it may leave out the rest."""
_BEHIND_BYTES = 8 << 20


class Pages:
    """Of the open `file` of `rows` rows of `row_bytes`, `chunk` of them in a chunk.

    Nothing where the system has no `posix_fadvise`. Memory: a number for each chunk that is in use.
    """

    def __init__(self, file: int, rows: int, row_bytes: int, chunk: int) -> None:
        self._file, self._rows, self._row, self._chunk = file, rows, row_bytes, chunk
        self.by_chunk = False
        """Whether rows are read so that those of a chunk are near each other in time."""
        self.most: int | None = None
        """Bytes at the start of the file that may stay; None is all of it."""
        self._written = self._used = 0
        self._left: dict[int, int] = {}
        """Of chunks in use, the rows that have not been asked for."""
        self._asked: list[tuple[int, int]] = []
        """Offset and size of what was asked for last."""

    def ahead(self, indices: Iterable[int]) -> None:
        """Have these rows read, or the chunks that they are in, while something else is computed."""
        if self.by_chunk:
            self._asked = [self._place(chunk * self._chunk, self._chunk) for chunk in self._chunks_of(indices)]
            return
        self._asked = [self._place(index) for index in indices]
        for offset, size in self._asked:
            self._read(offset, size)

    def _chunks_of(self, indices: Iterable[int]) -> set[int]:
        """The chunks of these rows; those that come into use are read whole."""
        chunks = set()
        for index in indices:
            chunk = index // self._chunk
            chunks.add(chunk)
            if chunk not in self._left:
                self._left[chunk] = min(self._chunk, self._rows - chunk * self._chunk)
                self._read(*self._place(chunk * self._chunk, self._chunk))
            self._left[chunk] -= 1
            if not self._left[chunk]:
                del self._left[chunk]
        return chunks

    def wrote(self, stop: int) -> None:
        """All up to byte `stop` was written, in order."""
        while self.most is not None and stop - self._written >= _BEHIND_BYTES:
            # asked for what is not on the disk yet, the kernel begins to write it there; it is given up the next time
            self._drop(self._written - _BEHIND_BYTES, self._written)
            self._drop(self._written, self._written + _BEHIND_BYTES)
            self._written += _BEHIND_BYTES

    def used(self, offset: int, size: int, *, in_order: bool) -> None:
        """These bytes were read, in the order of the file or of an epoch."""
        self._used += size
        if self.most is None or self._used < _BEHIND_BYTES:
            return
        self._used = 0  # much at a time: the kernel keeps pages in groups, and gives up whole groups alone
        if in_order:
            self._drop(0, offset + size)  # what it reads ahead lies behind
            return
        start, chunks = 0, [self._place(chunk * self._chunk, self._chunk) for chunk in self._left]
        for wanted, count in sorted({*chunks, *self._asked}):
            self._drop(start, wanted)
            start = wanted + count
        self._drop(start, self._rows * self._row)

    def _place(self, row: int, count: int = 1) -> tuple[int, int]:
        return row * self._row, min(count, self._rows - row) * self._row

    def _read(self, offset: int, size: int) -> None:
        for start in range(offset, offset + size, _AHEAD_BYTES):
            self._advise(start, min(_AHEAD_BYTES, offset + size - start), "POSIX_FADV_WILLNEED")

    def _drop(self, start: int, stop: int) -> None:
        start = max(start, self.most or 0)
        if start < stop:
            self._advise(start, stop - start, "POSIX_FADV_DONTNEED")

    def _advise(self, offset: int, size: int, advice: str) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, offset, size, getattr(os, advice))
