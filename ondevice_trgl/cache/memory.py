"""The memory tier: one tensor, which counts in the budget."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ondevice_trgl.cache.base import BoundaryCache


class MemoryCache(BoundaryCache):
    """All rows in one CPU tensor of rows x row_bytes."""

    def __init__(self, rows: int, shape: tuple[int, ...], dtype: str) -> None:
        super().__init__(rows, shape, dtype)
        self._data = torch.empty((rows, self.row_bytes), dtype=torch.uint8)

    def _write(self, start: int, block: Tensor) -> None:
        self._data[start : start + len(block)] = block

    def _read(self, indices: Sequence[int], out: Tensor) -> None:
        if isinstance(indices, range) and indices.step == 1:
            self.codec.decode(self._data[indices.start : indices.stop], out[: len(indices)])
            return
        for position, index in enumerate(indices):  # row by row: a gather would hold a second batch
            self.codec.decode(self._data[index : index + 1], out[position : position + 1])

    def close(self, *, keep: bool = False) -> None:
        self._data = torch.empty(0)
