"""A network whose weights alone are larger than the budget: ViT-L/16 (1.2 GB of weights) inside 700 MB.

Trains an epoch, evaluates and exports; beside it plain and checkpointed end-to-end on the same work, each in a process
of its own. Writes results/larger_than_budget.json. Takes a quarter of an hour on two cores.

    python benchmarks/larger_than_budget.py [--model vit_l_16] [--budget 700MB]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.device.start import plain_environment, tuned_environment
from ondevice_trgl.job import BaselineRequest
from ondevice_trgl.processes import ask

RESULTS = Path(__file__).parent / "results" / "larger_than_budget.json"


def command(*arguments: str) -> tuple[dict[str, Any], float]:
    """The JSON that a command prints, and its seconds."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "ondevice_trgl", *arguments, "--json"], capture_output=True, text=True, check=True
    )
    record: dict[str, Any] = json.loads(done.stdout)
    return record, time.perf_counter() - started


def end_to_end(name: str, model: str, data: str, batch: int) -> dict[str, Any]:
    """Peak and seconds an epoch of end-to-end training: plain, or e2e_checkpoint, as `trgl-device compare` has them."""
    plain = name == "plain"
    with tempfile.TemporaryDirectory(prefix="trgl-bench-") as folder:
        request = BaselineRequest(
            name=name,
            workload=Workload(model=model, data=data),
            config=TrainConfig(budget="1TB"),
            batch_size=batch,
            scratch_dir=Path(folder),
            allocator="system" if plain else "auto",
        )
        environment = plain_environment(os.environ) if plain else tuned_environment(os.environ, "auto")
        report = ask("baseline", request.to_dict(), environment=environment, lean=not plain)
    assert report["measured_peak_bytes"] is not None, report["reason"]
    return {name: report[name] for name in ("measured_peak_bytes", "seconds_per_epoch")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="vit_l_16")
    parser.add_argument("--data", default="synthetic:3x224x224:10:64")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--budget", default="700MB")
    asked = parser.parse_args()
    script = end_to_end("plain", asked.model, asked.data, asked.batch_size)
    flags = ["--model", asked.model, "--data", asked.data, "--batch-size", str(asked.batch_size), "-b", asked.budget]
    _, planning = command("plan", *flags, "--progress", "none")
    with tempfile.TemporaryDirectory(prefix="trgl-bench-") as folder:
        run = f"{folder}/run"
        trained, _ = command(*("train", *flags, "--epochs", "1", "--baseline", "skip", "--progress", "none", "-o", run))
        evaluated, _ = command("evaluate", run)
        exported, _ = command("export", run, "-o", f"{folder}/model.safetensors")
    record = {
        "workload": {"model": asked.model, "data": asked.data, "batch_size": asked.batch_size, "epochs": 1, "seed": 0},
        "environment": trained["environment"],
        "budget_bytes": trained["budget_bytes"],
        "weights_bytes": exported["bytes"],
        "plan_seconds": planning,
        "trgl": {
            "measured_peak_bytes": trained["measured_peak_bytes"],
            "predicted_peak_bytes": trained["predicted_peak_bytes"],
            "evaluate_peak_bytes": evaluated["measured_peak_bytes"],
            "seconds_per_epoch": trained["seconds"]["per_epoch"],
        },
        "plain": script,
        "e2e_checkpoint": end_to_end("e2e_checkpoint", asked.model, asked.data, asked.batch_size),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("| | peak MB | of plain | s / epoch |\n|---|---|---|---|")
    for name in ("plain", "e2e_checkpoint", "trgl"):
        row: dict[str, Any] = record[name]
        peak = row["measured_peak_bytes"]
        share = peak / script["measured_peak_bytes"]
        print(f"| {name} | {peak / 1e6:.0f} | {share:.3f} | {row['seconds_per_epoch']:.0f} |")


if __name__ == "__main__":
    main()
