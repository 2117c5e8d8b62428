"""What the boundary cache on disk costs: writing, reading in order and shuffled, taking up after a restart, memory.

Each beside plain `pwrite` and `pread` of the same bytes into the same buffer, the two in turn, medians of several runs:
with the file in the page cache, and after the kernel was told to drop it. Peak RSS while all of a large boundary is
read, above what the process held with its buffers. Writes results/cache_io.json.

    python benchmarks/cache_io.py [--megabytes 512] [--row 3x64x64 ...] [--folder DIR]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.cache.codec import Codec
from ondevice_trgl.cache.disk import DiskCache
from ondevice_trgl.cache.memory import MemoryCache
from ondevice_trgl.device.environment import describe_environment
from ondevice_trgl.device.meter import RssMeter
from ondevice_trgl.run.batches import shuffled

RESULTS = Path(__file__).resolve().parent / "results" / "cache_io.json"
BATCH = 32


def seconds(*ways: Callable[[], None], repeat: int = 5, before: Callable[[], None] = lambda: None) -> list[float]:
    """The median of each, run in turn."""
    found: list[list[float]] = [[] for _ in ways]
    for _ in range(repeat):
        for way, times in zip(ways, found, strict=True):
            before()
            started = time.perf_counter()
            way()
            times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in found]


def dropped(path: Path) -> Callable[[], None]:
    """Has the kernel forget what it has of a file."""

    def drop() -> None:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)

    return drop


def measure(shape: tuple[int, ...], dtype: str, size: int, folder: Path) -> dict[str, Any]:
    """Rates in MB/s of activations as the network sees them (fp32)."""
    rows = max(BATCH, size // (4 * torch.Size(shape).numel()) // BATCH * BATCH)
    values, out = torch.randn(BATCH, *shape), torch.empty(BATCH, *shape)
    labels, path, plain = torch.zeros(rows, dtype=torch.int64), folder / "boundary.bin", folder / "plain.bin"
    megabytes, row = rows * values[0].numel() * 4 / 1e6, Codec(dtype, shape).row_bytes
    block = memoryview(bytearray(BATCH * row))

    def write() -> None:
        with_seal = DiskCache(path, rows, shape, dtype)
        for start in range(0, rows, BATCH):
            with_seal.append(values, labels[start : start + BATCH])
        with_seal.seal("benchmark")
        with_seal.close(keep=True)

    def write_plain() -> None:
        file = os.open(plain, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        for start in range(0, rows, BATCH):
            os.pwrite(file, block, start * row)
        os.close(file)

    writing = seconds(write, write_plain, repeat=3)
    started = time.perf_counter()
    cache = DiskCache.sealed(path, "benchmark", shape, dtype, labels)
    assert cache is not None
    assert cache.damaged() == []
    taking_up = time.perf_counter() - started
    order, file = shuffled(rows, 0), os.open(path, os.O_RDONLY)
    memory = MemoryCache(rows, shape, dtype) if size <= 600e6 else None
    for start in range(0, rows if memory else 0, BATCH):
        assert memory is not None
        memory.append(values, labels[start : start + BATCH])

    def read(indices: Any, source: Any) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, rows, BATCH):
                source.read(indices[start : start + BATCH], out)

        return run

    def read_plain(indices: Any, rows_at_once: int) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, rows, rows_at_once):
                os.preadv(file, [block[: rows_at_once * row]], indices[start] * row)

        return run

    in_order, plainly, mixed, mixed_plainly = seconds(
        read(range(rows), cache), read_plain(range(rows), BATCH), read(order, cache), read_plain(order, 1)
    )
    cold = seconds(
        read(range(rows), cache),
        read_plain(range(rows), BATCH),
        read(order, cache),
        read_plain(order, 1),
        repeat=3,
        before=dropped(path),
    )
    from_memory = seconds(read(order, memory))[0] if memory else None
    with RssMeter() as meter:
        held = meter.current_bytes()
        meter.reset()
        read(range(rows), cache)()
        peak = meter.peak_bytes()
    os.close(file)
    cache.close()
    plain.unlink()

    def rate(spent: float | None) -> float | None:
        return None if spent is None else round(megabytes / spent, 1)

    names = ("in order", "in order, plain pread", "shuffled", "shuffled, plain pread")
    return {
        "row_bytes": row,
        "megabytes_fp32": round(megabytes, 1),
        "written": rate(writing[0]),
        "written, plain pwrite": rate(writing[1]),
        **{name: rate(spent) for name, spent in zip(names, (in_order, plainly, mixed, mixed_plainly), strict=True)},
        **{f"{name}, not in RAM": rate(spent) for name, spent in zip(names, cold, strict=True)},
        "shuffled, memory tier": rate(from_memory),
        "checked": rate(taking_up),
        "peak_above_buffers_bytes": max(0, peak - held),
        "buffer_bytes": len(bytes_of(out)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512, help="of activations, in fp32")
    parser.add_argument("--row", nargs="+", default=["64x16x16", "512x2x2", "197x768"], help="shapes of a sample")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    given = parser.parse_args()
    torch.manual_seed(0)
    found = {}
    with tempfile.TemporaryDirectory(prefix="cache-io-", dir=given.folder) as folder:
        for text in given.row:
            for dtype in given.dtype:
                shape = tuple(map(int, text.split("x")))
                found[f"{text} {dtype}"] = measure(shape, dtype, given.megabytes * 1_000_000, Path(folder))
                print(text, dtype, json.dumps(found[f"{text} {dtype}"]), flush=True)
    record = {"environment": describe_environment(threads=torch.get_num_threads(), device="cpu"), "rows": found}
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
