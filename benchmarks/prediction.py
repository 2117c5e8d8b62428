"""Predicted peaks beside measured ones: networks of several kinds at several budgets, by command line and as a library.

Every row is a run of its own: planned, trained for one epoch, its peak read off the kernel (VmHWM of the process, and
of what set it up). Both ways use the same allocator. Writes results/prediction.json.

    python benchmarks/prediction.py [--only resnet50] [--ways cli,library]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ondevice_trgl.device.allocator import tcmalloc_library

RESULTS = Path(__file__).parent / "results" / "prediction.json"
WORKLOADS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "resnet50": ("synthetic:3x128x128:10:96", 32, ("380MB", "600MB", "1000MB")),
    "resnet110": ("synthetic:3x96x96:10:192", 64, ("500MB", "900MB", "1500MB")),
    "vgg16_bn": ("synthetic:3x64x64:10:192", 64, ("1600MB", "1900MB", "2500MB")),
    "vit_b_16": ("synthetic:3x224x224:10:48", 16, ("450MB", "700MB", "1200MB")),
    "swin_t": ("synthetic:3x224x224:10:48", 16, ("500MB", "700MB", "1200MB")),
}
"""Model: data, batch size, budgets."""

# What an app does: a callable that makes the model, datasets of its own, nothing of the command line.
LIBRARY = """
import json, sys
from ondevice_trgl import BudgetInfeasibleError, TrainConfig, Trainer
from ondevice_trgl.data.registry import load_data
from ondevice_trgl.model.zoo import build_model

model, data, batch, budget, folder = sys.argv[1:]
bundle = load_data(data, root=None, image_size=None, train_limit=None, channels=None, seed=0, scratch_dir=None)
config = TrainConfig(budget=budget, batch_size=int(batch), epochs=1)
make = lambda: build_model(model, num_classes=bundle.num_classes, in_shape=bundle.input_shape)
try:
    report = Trainer(make, config, run_dir=folder).fit(bundle.train, bundle.val, bundle.test)
    print(json.dumps(report.to_dict()))
except BudgetInfeasibleError as refusal:
    print(json.dumps({"status": "infeasible", **vars(refusal)}))
"""


def run(way: str, model: str, data: str, batch: int, budget: str) -> dict[str, Any]:
    """The report of one run; of a refusal, its record."""
    with tempfile.TemporaryDirectory(prefix="trgl-bench-") as folder:
        if way == "cli":
            flags = ["--model", model, "--data", data, "--batch-size", str(batch), "-b", budget, "--epochs", "1"]
            command = [sys.executable, "-m", "ondevice_trgl", "train", *flags, "--baseline", "skip", "--json"]
            command += ["--progress", "none", "-o", f"{folder}/run"]
        else:
            command = [sys.executable, "-c", LIBRARY, model, data, str(batch), budget, f"{folder}/run"]
        library = tcmalloc_library()
        environment = {**os.environ, **({"LD_PRELOAD": str(library)} if library else {})}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not done.stdout:
        return {"status": f"failed: {done.stderr.strip().splitlines()[-1]}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1] if way != "cli" else done.stdout)
    return answer


def row(way: str, model: str, budget: str, report: dict[str, Any]) -> dict[str, Any]:
    """One line of the table. Errors are (predicted - measured) / measured."""
    entry: dict[str, Any] = {"way": way, "model": model, "budget": budget, "status": report["status"]}
    if report["status"] != "completed":
        return {**entry, "smallest_feasible_budget_bytes": report.get("smallest_feasible_budget_bytes")}
    errors = [m["predicted_peak_bytes"] / m["measured_peak_bytes"] - 1 for m in report["modules"]]
    return {
        **entry,
        "modules": report["plan"]["num_modules"],
        "micro_batch_sizes": [m["micro_batch_size"] for m in report["modules"]],
        "checkpointed": [m["activation_checkpointing"] for m in report["modules"]],
        "predicted_peak_bytes": report["predicted_peak_bytes"],
        "measured_peak_bytes": report["measured_peak_bytes"],
        "error": report["predicted_peak_bytes"] / report["measured_peak_bytes"] - 1,
        "module_errors": [min(errors), max(errors)],
        "pressures": len(report["pressure"]),
        "allocator": report["environment"]["allocator"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default=",".join(WORKLOADS))
    parser.add_argument("--ways", default="cli,library")
    asked = parser.parse_args()
    rows = []
    print(
        "| model | budget | way | modules | predicted MB | measured MB | error | worst modules |\n" + "|---" * 8 + "|"
    )
    for model in asked.only.split(","):
        data, batch, budgets = WORKLOADS[model]
        for budget in budgets:
            for way in asked.ways.split(","):
                entry = row(way, model, budget, run(way, model, data, batch, budget))
                rows.append(entry)
                if entry["status"] != "completed":
                    print(f"| {model} | {budget} | {way} | {entry['status']} | | | | |", flush=True)
                    continue
                low, high = entry["module_errors"]
                print(
                    f"| {model} | {budget} | {way} | {entry['modules']} | {entry['predicted_peak_bytes'] / 1e6:.0f} "
                    f"| {entry['measured_peak_bytes'] / 1e6:.0f} | {entry['error']:+.1%} | {low:+.1%} .. {high:+.1%} |",
                    flush=True,
                )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
