"""The boundary that the module in training reads, and the one that it writes: at most two stand at a time."""

from pathlib import Path

from torch import Tensor

from ondevice_trgl.cache.base import BoundaryCache
from ondevice_trgl.cache.disk import DiskCache
from ondevice_trgl.cache.memory import MemoryCache
from ondevice_trgl.run.batches import Source

SPLITS = ("train", "val", "test")


class Boundaries:
    """Sources of every split at one boundary, starting at the dataset (boundary 0)."""

    def __init__(self, data: dict[str, Source], tier: str, dtype: str, folder: Path) -> None:
        self._data = data
        self._tier, self._dtype, self._folder = tier, dtype, folder
        self._read: dict[str, BoundaryCache] = {}
        self._written: dict[str, BoundaryCache] = {}
        self.index = 0
        """The boundary that `source` reads: 0 is the dataset, k the output of module k - 1."""

    def source(self, split: str) -> Source:
        return self._read[split] if self.index else self._data[split]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(split for split in SPLITS if split in self._data)

    def append(self, split: str, shape: tuple[int, ...], activations: Tensor, labels: Tensor) -> None:
        """Add a batch to the next boundary. Raises StorageError."""
        if split not in self._written:
            self._written[split] = self._new(split, len(self._data[split].labels), shape)
        self._written[split].append(activations, labels)

    def _new(self, split: str, rows: int, shape: tuple[int, ...]) -> BoundaryCache:
        if self._tier == "memory":
            return MemoryCache(rows, shape, self._dtype)
        return DiskCache(self._folder / f"boundary-{self.index + 1:03d}-{split}.bin", rows, shape, self._dtype)

    def traffic(self) -> tuple[int, int]:
        """Bytes (read from this boundary, written to the next) so far."""
        read = sum(cache.bytes_read for cache in self._read.values())
        return read, sum(cache.bytes_written for cache in self._written.values())

    def advance(self, by: int = 1) -> None:
        """What was written, `by` modules further on, becomes what is read; the boundary before is deleted."""
        for cache in self._written.values():
            cache.seal()
        _close(self._read)
        self._read, self._written = self._written, {}
        self.index += by

    def rewind(self) -> None:
        """Back to the dataset."""
        self.close()
        self.index = 0

    def close(self) -> None:
        """Delete every activation."""
        _close(self._read)
        _close(self._written)
        self._read, self._written = {}, {}


def _close(caches: dict[str, BoundaryCache]) -> None:
    for cache in caches.values():
        cache.close()
