"""Peak memory of named workloads, each trained in every way that `trgl-device compare` knows, TRGL at several budgets.

Every row is a process of its own, measured by the kernel (VmHWM of the whole process); the rows of a workload are
measured in turn, three times, and medians reported. A workload that was run replaces its own record in
results/peak_memory.json and no other, so that they can be run one at a time; the tables for the README are printed from
that file. Hours on two cores for all of them.

    python benchmarks/peak_memory.py [--only resnet50-128,vit_b_16-224] [--repeat 3]
    python benchmarks/peak_memory.py --tables
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "peak_memory.json"


@dataclass(frozen=True)
class Workload:
    """`side`: pixels of a square image; `steps`: an epoch, as all images of a synthetic dataset are to train on."""

    model: str
    side: int
    batch: int
    steps: int
    budgets: str
    repeat: int = 3

    def arguments(self, repeat: int | None) -> list[str]:
        """What `trgl-device` is called with."""
        data = f"synthetic:3x{self.side}x{self.side}:10:{self.batch * self.steps}"
        work = ["--model", self.model, "--data", data, "--batch-size", str(self.batch), "--epochs", "1"]
        return ["compare", *work, "--budget", self.budgets, "--repeat", str(repeat or self.repeat), "--json"]


WORKLOADS = {
    "resnet50-128": Workload("resnet50", 128, 32, 3, "360MB,400MB,600MB,800MB"),
    "resnet50-224": Workload("resnet50", 224, 32, 2, "500MB,700MB,1000MB"),
    "resnet110-96": Workload("resnet110", 96, 64, 3, "380MB,700MB,1500MB"),
    "vgg16_bn-64": Workload("vgg16_bn", 64, 64, 3, "1150MB,1550MB,1900MB"),
    "vit_b_16-224": Workload("vit_b_16", 224, 16, 2, "450MB,700MB"),
    "vit_l_16-224": Workload("vit_l_16", 224, 16, 2, "700MB,1200MB", repeat=1),
}


def compared(arguments: list[str]) -> dict[str, Any]:
    """What `compare --json` prints, with the command that it was; exits where that is no comparison."""
    done = subprocess.run([sys.executable, "-m", "ondevice_trgl", *arguments], stdout=subprocess.PIPE, check=False)
    record: dict[str, Any] = json.loads(done.stdout or "{}")
    if "rows" not in record:
        raise SystemExit(f"{' '.join(arguments)} ended with status {done.returncode}")
    return record


def recorded() -> dict[str, Any]:
    """The workloads in the file of results, by name; those that are no longer named here are left out."""
    try:
        known = json.loads(RESULTS.read_text(encoding="utf-8")).get("workloads", {})
    except FileNotFoundError:
        return {}
    return {name: known[name] for name in WORKLOADS if name in known}


def table(name: str, record: dict[str, Any]) -> str:
    """The Markdown table of a workload."""
    work, environment = record["workload"], record["environment"]
    lines = [
        f"**{name}**: {work['model']}, {work['data'].split(':')[1]}, batch {record['config']['batch_size']}, "
        f"{'medians of ' + str(record['repeat']) if record['repeat'] > 1 else 'measured once'}, "
        f"torch {environment.get('torch', '?')}, {environment.get('threads', '?')} threads",
        "",
        "| | peak MB | of plain | above the floor MB | s / epoch | of it caching | predicted MB | modules |",
        "|---" * 8 + "|",
    ]
    plain = record["rows"][0]["peak_bytes"]
    for row in record["rows"]:
        peak = row["peak_bytes"]
        cells = [
            f"{peak / 1e6:.0f}" if peak is not None else row["status"].replace("_", " "),
            f"{peak / plain:.2f}" if peak is not None and plain else "",
            megabytes(row["above_floor_bytes"]),
            seconds(row["seconds_per_epoch"]),
            seconds(row["caching_seconds_per_epoch"]),
            megabytes(row["predicted_peak_bytes"]),
            str(row["modules"] or ""),
        ]
        note = f" ({row['note']})" if row["note"] else ""
        lines.append(f"| {row['label']}{note} | {' | '.join(cells)} |")
    return "\n".join(lines)


def megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f}"


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default=",".join(WORKLOADS), help="names of workloads, between commas")
    parser.add_argument("--repeat", type=int, help="measure each row so often, instead of what the workload says")
    parser.add_argument("--tables", action="store_true", help="print the tables of what was measured, and stop")
    asked = parser.parse_args()
    names = [] if asked.tables else asked.only.split(",")
    if unknown := [name for name in names if name not in WORKLOADS]:
        parser.error(f"unknown workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        measured = {name: compared(WORKLOADS[name].arguments(asked.repeat))}
        workloads = recorded() | measured
        ordered = {known: workloads[known] for known in WORKLOADS if known in workloads}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"workloads": ordered}, indent=2) + "\n", encoding="utf-8")
    print("\n\n".join(table(name, record) for name, record in recorded().items()))


if __name__ == "__main__":
    main()
