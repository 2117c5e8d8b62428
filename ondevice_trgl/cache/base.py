"""What a cache of one boundary is: rows of fixed shape, written once in order, read in any order."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from ondevice_trgl.cache.codec import Codec


class BoundaryCache(ABC):
    """Activations of `rows` samples at one boundary, each of `shape`, with their labels, kept as `dtype`.

    Labels are class numbers, int64 (rows,), or targets, float32 (rows, T), as the first batch has them.
    Write every row with `append`, call `seal`, then `read` at will. `close` gives memory and disk back.
    """

    def __init__(self, rows: int, shape: tuple[int, ...], dtype: str) -> None:
        self.rows, self.shape, self.dtype = rows, shape, dtype
        self.labels = torch.empty(rows, dtype=torch.int64)
        self.codec = Codec(dtype, shape)
        self.row_bytes = self.codec.row_bytes
        self.lost = 0.0
        """Most of what `Codec.error` found, in a row of each batch that was added."""
        self.bytes_read = self.bytes_written = 0
        self._filled = 0

    def append(self, activations: Tensor, labels: Tensor) -> None:
        """Add activations (n, *shape) of any float dtype and labels (n,) or (n, T). Raises StorageError."""
        start, stop = self._filled, self._filled + len(labels)
        if not start and labels.is_floating_point():
            self.labels = labels.new_empty((self.rows, *labels.shape[1:]))
        self.labels[start:stop] = labels
        if len(labels):
            self.lost = max(self.lost, self.codec.error(activations[0]))
        self._keep(start, activations)
        self.bytes_written += len(labels) * self.row_bytes
        self._filled = stop

    def seal(self, producer: str = "") -> None:
        """All rows are written, by what the digest `producer` stands for."""
        assert self._filled == self.rows

    def read(self, indices: Sequence[int], out: Tensor) -> Tensor:
        """Fill out[:len(indices)] with those rows; returns their labels. Raises DamagedFileError."""
        self._read(indices, out)
        self.bytes_read += len(indices) * self.row_bytes
        return self.labels_of(indices)

    def labels_of(self, indices: Sequence[int]) -> Tensor:
        """Labels or targets of those rows."""
        if isinstance(indices, range) and indices.step == 1:
            return self.labels[indices.start : indices.stop]
        return self.labels[torch.as_tensor(indices, dtype=torch.int64)]

    def views(self, indices: Sequence[int]) -> list[Tensor] | None:
        """Those rows, each (*shape), where they lie, for a GPU to copy by itself; None where it cannot."""
        return None

    def ahead(self, indices: Sequence[int]) -> None:
        """Rows that will be read next, for a tier that can make use of the time until then."""
        return

    def _keep(self, start: int, activations: Tensor) -> None:
        """Keep activations, (n, *shape) on any device, from row `start` on."""
        self._write(start, self.codec.encode(activations))

    def _as(self, other: "BoundaryCache") -> None:
        """Be as far as `other`, whose rows were taken over."""
        self.labels, self._filled, self.lost = other.labels, other._filled, other.lost
        self.bytes_read, self.bytes_written = other.bytes_read, other.bytes_written

    @abstractmethod
    def _write(self, start: int, block: Tensor) -> None:
        """Keep encoded rows, uint8 (n, row_bytes), from row `start` on."""

    @abstractmethod
    def _read(self, indices: Sequence[int], out: Tensor) -> None: ...

    @abstractmethod
    def close(self, *, keep: bool = False) -> None:
        """Give memory and disk back; the rows are gone, but with `keep` those of a sealed file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
