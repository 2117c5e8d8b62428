"""Every run ends within its budget or is refused before it trains: networks x budgets, under a limit of the kernel's.

Each cell is `trgl-device train` in a memory cgroup of exactly its budget, without swap: what takes more is killed. It
completes, or is refused with exit 3, or stops with exit 4 and is resumed at larger budgets until it completes; anything
else is a fault. With --falsify the planner is wrong on purpose (it believes in 0.7 of what it estimates), so that
enforcement alone holds the budget. Writes results/budget_grid.json after every cell, so it can be run in pieces.

    python benchmarks/budget_grid.py [--only resnet50] [--budgets 350,450] [--falsify 0.7] [--folder DISK]
"""

import argparse
import contextlib
import fcntl
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernel_limit import Ended, NoKernelLimitError, kernel_limit

from ondevice_trgl.plan.falsify import VARIABLE

RESULTS = Path(__file__).parent / "results" / "budget_grid.json"
WORKLOADS = {
    "resnet50": (128, 32),
    "resnet110": (96, 64),
    "vit_b_16": (224, 16),
    "swin_t": (224, 16),
    "mobilenet_v3_large": (224, 32),
    "densenet121": (128, 32),
}
"""Model: side of its images, batch size."""
BUDGETS_MB = (320, 350, 450, 600, 800, 1200)
SECONDS = 600
"""A cell that takes longer hangs."""
LARGER, MOST_RESUMES = 1.25, 8
REFUSED, STOPPED = 3, 4


def train(model: str, budget_mb: int, folder: Path, scale: float | None, allocator: str) -> dict[str, Any]:
    """One cell: trained, and resumed where it stopped."""
    side, batch = WORKLOADS[model]
    data, run = f"synthetic:3x{side}x{side}:10:{2 * batch}", str(folder / "run")  # two steps an epoch
    flags = ["--model", model, "--data", data, "--batch-size", str(batch), "--budget", f"{budget_mb}MB"]
    flags += ["--allocator", allocator]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}  # nothing is known from earlier runs
    if scale is not None:
        environment[VARIABLE] = str(scale)
    started, budget = time.monotonic(), budget_mb * 1_000_000
    ended = _command(["train", *flags, "--epochs", "1", "--baseline", "skip", "-o", run], budget, environment)
    cell = _outcome(ended, budget)
    stopped, resumed = cell, 0
    while stopped["outcome"] == "stopped" and resumed < MOST_RESUMES:
        budget, resumed = int(LARGER * budget), resumed + 1
        stopped = _outcome(_command(["resume", run, "--budget", str(budget)], budget, environment), budget)
    if resumed:
        stopped.pop("environment", None)
        cell |= {"resumes": resumed, "resumed": stopped}
    return {**cell, "seconds": round(time.monotonic() - started, 1)}


def _command(arguments: list[str], limit: int, environment: dict[str, str]) -> Ended:
    command = [sys.executable, "-m", "ondevice_trgl", *arguments, "--json", "--progress", "none"]
    with kernel_limit(limit) as group:
        return group.run(command, environment=environment, timeout=SECONDS)


def _outcome(ended: Ended, budget: int) -> dict[str, Any]:
    """What came of one command. completed | refused | stopped are promised; killed | hung | exceeded | failed not."""
    lines = ended.error.strip().splitlines()
    cell: dict[str, Any] = {"budget_bytes": budget, "exit": ended.status, "kernel_peak_bytes": ended.peak_bytes}
    try:
        record = json.loads(ended.out)
    except ValueError:
        record = {}
    if ended.killed:
        return {**cell, "outcome": "killed", "error": lines[-1:]}
    if ended.timed_out:
        return {**cell, "outcome": "hung", "error": lines[-1:]}
    if ended.status == REFUSED:
        return {**cell, "outcome": "refused", "smallest_bytes": record["smallest_feasible_budget_bytes"]}
    if record.get("status") == "completed":
        cell |= {
            "outcome": "completed" if ended.status == 0 else "exceeded",
            "peak_bytes": record["measured_peak_bytes"],
            "predicted_peak_bytes": record["predicted_peak_bytes"],
            "environment": {name: record["environment"][name] for name in ("torch", "threads", "cpu", "platform")},
            "allocator": record["environment"]["allocator"],
            "modules": record["plan"]["num_modules"],
            "micro_batch_sizes": sorted({module["micro_batch_size"] for module in record["modules"]}),
            "pressures": [
                f"module {one['module']} step {one['step']}: {one['before']} -> {one['after']}"
                for one in record["pressure"]
            ],
        }
        return cell
    if ended.status == STOPPED:
        return {**cell, "outcome": "stopped", "error": [record.get("message", "")]}
    return {**cell, "outcome": "failed", "error": lines[-3:]}


@contextlib.contextmanager
def results() -> Iterator[dict[str, Any]]:
    """The results so far, to be changed; several scripts may do so at once."""
    RESULTS.parent.mkdir(exist_ok=True)
    with Path(__file__).open(encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        yield record
        RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def table(cells: dict[str, dict[str, Any]]) -> list[str]:
    """The grid as markdown."""
    lines = ["| MB | " + " | ".join(WORKLOADS) + " |", "|---" * (len(WORKLOADS) + 1) + "|"]
    for budget in BUDGETS_MB:
        row = [_words(cells.get(f"{model} {budget}MB")) for model in WORKLOADS]
        lines.append(f"| {budget} | " + " | ".join(row) + " |")
    return lines


def _words(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if cell["outcome"] == "refused":
        return f"refused: {cell['smallest_bytes'] / 1e6:.0f}"
    if cell["outcome"] == "completed":
        pressures = len(cell["pressures"])
        words = f"{cell['peak_bytes'] / 1e6:.0f}, {cell['modules']} modules"
        return words + (f", {pressures} pressures" if pressures else "")
    if "resumed" in cell:
        end = cell["resumed"]
        return f"{cell['outcome']}; {end['outcome']} at {end['budget_bytes'] / 1e6:.0f}, resumed {cell['resumes']}x"
    return f"**{cell['outcome']}**"


def memory_backed(folder: Path) -> bool:
    """Whether files in `folder` lie in memory, where the kernel counts them against whoever writes them."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    holding = [(point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]))[1] in ("tmpfs", "ramfs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default=",".join(WORKLOADS), help="models")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS_MB)), help="in MB")
    parser.add_argument("--falsify", type=float, metavar="SCALE", help="have the planner believe in so much of it")
    parser.add_argument("--allocator", default="auto", help="as of train")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on a disk, for the runs")
    asked = parser.parse_args()
    if memory_backed(asked.folder):
        sys.exit(f"{asked.folder} lies in memory, which counts: --folder takes one on a disk")
    try:
        with kernel_limit(1 << 30):
            pass
    except NoKernelLimitError as error:
        sys.exit(f"no memory cgroup can be made here: {error}")
    kind = "cells" if asked.falsify is None else f"falsified {asked.falsify:g}"
    kind += "" if asked.allocator == "auto" else f", {asked.allocator}"
    for budget in map(int, asked.budgets.split(",")):
        for model in asked.only.split(","):
            with tempfile.TemporaryDirectory(prefix="trgl-bench-", dir=asked.folder) as folder:
                cell = train(model, budget, Path(folder), asked.falsify, asked.allocator)
            with results() as record:
                record["environment"] = cell.pop("environment", record.get("environment"))
                record.setdefault(kind, {})[f"{model} {budget}MB"] = cell
            print(f"{model} {budget}MB: {_words(cell)} ({cell['seconds']:.0f} s)", file=sys.stderr, flush=True)
    with results() as record:
        print("\n".join(table(record[kind])))


if __name__ == "__main__":
    main()
