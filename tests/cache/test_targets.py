"""Targets, float32 (rows, T), go through a cache as class numbers do."""

from pathlib import Path

import pytest
import torch

from ondevice_trgl.cache.base import BoundaryCache
from ondevice_trgl.cache.disk import DiskCache
from ondevice_trgl.cache.memory import MemoryCache


@pytest.mark.parametrize("tier", ["disk", "memory"])
def test_targets_come_back_with_their_rows(tier: str, tmp_path: Path) -> None:
    rows, targets = torch.randn(5, 2), torch.randn(5, 3)
    cache: BoundaryCache
    cache = DiskCache(tmp_path / "boundary.bin", 5, (2,), "fp32") if tier == "disk" else MemoryCache(5, (2,), "fp32")
    with cache:
        cache.append(rows[:3], targets[:3])
        cache.append(rows[3:], targets[3:])
        cache.seal()
        out = torch.empty(2, 2)
        assert torch.equal(cache.read([4, 1], out), targets[[4, 1]])
        assert torch.equal(out, rows[[4, 1]])
        assert cache.labels.dtype == torch.float32


def test_class_numbers_stay_whole(tmp_path: Path) -> None:
    with MemoryCache(2, (1,), "fp32") as cache:
        cache.append(torch.zeros(2, 1), torch.tensor([1, 0]))
        assert cache.read([0], torch.empty(1, 1)).dtype == torch.int64
