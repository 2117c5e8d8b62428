"""How fast module-wise training is beside end-to-end, caching included: seconds an epoch of ten epochs each.

Plain is a script with default settings and allocator; checkpointed end-to-end and TRGL run under the allocator that is
named, TRGL at a budget that is ample. All rows in turn, then all again, medians; `trgl-device compare` measures them. A
workload that was run replaces its own record in results/throughput.json. Half an hour each on two cores.

    python benchmarks/throughput.py [--only resnet18-64] [--allocators glibc,tcmalloc] [--repeat 3]
    python benchmarks/throughput.py --tables
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from peak_memory import compared

RESULTS = Path(__file__).resolve().parent / "results" / "throughput.json"
EPOCHS = 10
WORKLOADS = {
    "resnet18-64": ["resnet18", "synthetic:3x64x64:10:640", "32", "8", "700MB"],
    "resnet50-128": ["resnet50", "synthetic:3x128x128:10:128", "32", "8", "1300MB"],
    "vit_b_16-224": ["vit_b_16", "synthetic:3x224x224:10:32", "16", "8", "1300MB"],
}
"""Model, data, batch size, modules, budget."""


def measure(name: str, allocator: str, repeat: int) -> dict[str, Any]:
    """One comparison, as `compare --json` prints it."""
    model, data, batch, modules, budget = WORKLOADS[name]
    work = ["--model", model, "--data", data, "--batch-size", batch, "--modules", modules, "--epochs", str(EPOCHS)]
    arguments = ["compare", *work, "--budget", budget, "--allocator", allocator, "--repeat", str(repeat), "--json"]
    return compared(arguments)


def recorded() -> dict[str, Any]:
    """By workload and allocator."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def table(name: str, record: dict[str, Any]) -> str:
    """Markdown; ratios are of the plain script in the same run."""
    lines = [f"**{name}**", "", "| | seconds an epoch | of plain | of it caching | peak MB |", "|---" * 5 + "|"]
    plain = record["rows"][0]["seconds_per_epoch"]
    for row in record["rows"]:
        spent, caching, peak = (row[key] for key in ("seconds_per_epoch", "caching_seconds_per_epoch", "peak_bytes"))
        if spent is None:
            lines.append(f"| {row['label']} | {row['status']} | | | |")
            continue
        cached = "" if caching is None else f"{caching:.2f}"
        ratio = f"{spent / plain:.2f}" if plain else ""
        lines.append(f"| {row['label']} | {spent:.2f} | {ratio} | {cached} | {peak / 1e6:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(WORKLOADS), help="names of workloads, between commas")
    parser.add_argument("--allocators", default="glibc,tcmalloc")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tables", action="store_true", help="print the tables of what was measured, and stop")
    asked = parser.parse_args()
    names = [] if asked.tables else asked.only.split(",")
    if unknown := [name for name in names if name not in WORKLOADS]:
        parser.error(f"unknown workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    for name in names:
        for allocator in asked.allocators.split(","):
            key = f"{name} {allocator}"
            print(f"{key} ...", file=sys.stderr, flush=True)
            found = recorded() | {key: measure(name, allocator, asked.repeat)}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n\n".join(table(name, record) for name, record in recorded().items()))


if __name__ == "__main__":
    main()
