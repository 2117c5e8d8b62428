"""The memory tier: one tensor, which counts in the budget."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ondevice_trgl.cache.base import BoundaryCache
from ondevice_trgl.cache.codec import FLOATS
from ondevice_trgl.device import pinned


class MemoryCache(BoundaryCache):
    """All rows in one CPU tensor of rows x row_bytes; `for_gpu`, pinned.

    Pinned rows of fp32 are copied to the GPU from where they lie, see `views`. Raises MemoryError where not so much
    memory can be pinned.
    """

    def __init__(self, rows: int, shape: tuple[int, ...], dtype: str, *, for_gpu: bool = False) -> None:
        super().__init__(rows, shape, dtype)
        self._data = torch.empty((rows, self.row_bytes), dtype=torch.uint8)
        self._is_pinned = False
        if for_gpu:
            pinned.pin(self._data)
            self._is_pinned = True

    def _keep(self, start: int, activations: Tensor) -> None:
        if (rows := self._floats()) is None:
            super()._keep(start, activations)
        else:
            rows[start : start + len(activations)].copy_(activations.detach())  # from wherever it is, and once

    def _write(self, start: int, block: Tensor) -> None:
        self._data[start : start + len(block)] = block

    def _read(self, indices: Sequence[int], out: Tensor) -> None:
        if isinstance(indices, range) and indices.step == 1:
            self.codec.decode(self._data[indices.start : indices.stop], out[: len(indices)])
            return
        floats = self._floats()
        if floats is not None and floats.dtype == out.dtype and out.device.type == "cpu":
            torch.index_select(floats, 0, torch.as_tensor(indices, dtype=torch.int64), out=out[: len(indices)])
            return
        for position, index in enumerate(indices):  # row by row: a gather would hold a second batch
            self.codec.decode(self._data[index : index + 1], out[position : position + 1])

    def blocks(self, most: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows as they are kept), at most so many at a time, of what was added so far."""
        for start in range(0, self._filled, most):
            yield start, self._data[start : min(start + most, self._filled)]

    def views(self, indices: Sequence[int]) -> list[Tensor] | None:
        rows = self._floats() if self._is_pinned and self.dtype == "fp32" else None  # others the CPU would convert
        if rows is None:
            return None
        self.bytes_read += len(indices) * self.row_bytes
        return [rows[index] for index in indices]

    def _floats(self) -> Tensor | None:
        """The rows, (rows, *shape), of which a plain copy is all that is to be done."""
        if self.dtype not in FLOATS:
            return None
        return self._data.view(FLOATS[self.dtype]).view(self.rows, *self.shape)

    def close(self, *, keep: bool = False) -> None:
        if self._is_pinned:
            self._is_pinned = False
            pinned.unpin(self._data)
        self._data = torch.empty(0)
