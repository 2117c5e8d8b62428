"""How boundary activations are kept and read: the part of `TrainConfig` that the cache asks for."""

from dataclasses import dataclass
from pathlib import Path

from ondevice_trgl import checks
from ondevice_trgl.checks import Checked, setting
from ondevice_trgl.units import parse_size

CACHE_TIERS = ("auto", "memory", "disk")
CACHE_DTYPES = ("auto", "fp32", "bf16", "fp16", "int8")
SHUFFLES = ("exact", "chunks")


@dataclass(frozen=True, kw_only=True)
class CacheSettings(Checked):
    """Where activations wait between two modules, in which format, and in which order they are read."""

    cache: str = setting("auto", checks.one_of(*CACHE_TIERS))
    """Where boundary activations live between two modules."""
    cache_dir: str | Path | None = setting(None, checks.path)
    """Folder of the disk tier; None is inside the run directory."""
    cache_limit: str | int | None = setting(None, checks.size)
    """Most bytes that the cache may take on disk."""
    cache_dtype: str = setting("auto", checks.one_of(*CACHE_DTYPES))
    """auto is fp32, or bf16, or int8, where that would not fit `cache_limit`. Where much would be lost, a wider one."""
    shuffle: str = setting("exact", checks.one_of(*SHUFFLES))
    """exact: every epoch draws from all cached samples alike. chunks: for disks that are slow at single rows, chunks of
    about a megabyte come in random order, and samples are drawn from 32 of them at a time, which the kernel keeps in
    RAM meanwhile. The first module reads the data, and draws from all of it."""

    @property
    def cache_limit_bytes(self) -> int | None:
        """Most bytes that the cache may take on disk, or None."""
        return None if self.cache_limit is None else parse_size(self.cache_limit, what="cache_limit")
