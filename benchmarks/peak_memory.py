"""Peak memory of one workload: a plain script, end-to-end, checkpointed end-to-end, and TRGL at several budgets.

Every row is a process of its own, measured by the kernel (VmHWM of the whole process). Writes
results/peak_memory.json and prints the table that the README shows.

    python benchmarks/peak_memory.py [--model resnet50] [--data synthetic:3x128x128:10:128] [--batch-size 32]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "peak_memory.json"

# What one would write without this package: torchvision's model, torch.optim, the allocator as it comes.
PLAIN = """
import json, sys, time, torch
from ondevice_trgl._torchvision import torchvision_module
model_name, side, batch, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)
model = getattr(torchvision_module().models, model_name)(num_classes=10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=2e-4)
x, y = torch.randn(batch, 3, side, side), torch.randint(0, 10, (batch,))
seconds = []
for _ in range(steps):
    started = time.perf_counter()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    seconds.append(time.perf_counter() - started)
peak = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(json.dumps({"peak_bytes": peak, "seconds_per_step": sorted(seconds[1:])[len(seconds[1:]) // 2]}))
"""


def plain(model: str, side: int, batch: int, steps: int) -> dict[str, Any]:
    """Peak and seconds a step of the plain script, with glibc's defaults."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LD_PRELOAD", "MALLOC"))}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, model, str(side), str(batch), str(steps)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def trgl(flags: list[str], *, baseline: str) -> dict[str, Any]:
    """The report of one run of the command line; a refusal comes back as its JSON record."""
    with tempfile.TemporaryDirectory(prefix="trgl-bench-") as folder:
        command = [sys.executable, "-m", "ondevice_trgl", "train", *flags, "--baseline", baseline]
        done = subprocess.run(
            [*command, "--json", "--progress", "none", "-o", f"{folder}/run"],
            capture_output=True,
            text=True,
            check=False,
        )
    if not done.stdout:
        raise SystemExit(done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def row(name: str, peak: int | None, seconds: float | None, note: str = "") -> dict[str, Any]:
    return {"name": name, "peak_bytes": peak, "seconds_per_epoch": seconds, "note": note}


def run_row(name: str, report: dict[str, Any]) -> dict[str, Any]:
    if report["status"] != "completed":
        return row(name, None, None, f"refused: needs {report.get('smallest_feasible_budget_bytes', 0) / 1e6:.0f} MB")
    note = f"predicted {report['predicted_peak_bytes'] / 1e6:.0f} MB, {report['plan']['num_modules']} modules"
    return row(name, report["measured_peak_bytes"], report["seconds"]["per_epoch"], note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--data", default="synthetic:3x128x128:10:128")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--budgets", default="400MB,450MB,600MB,800MB,1200MB")
    asked = parser.parse_args()
    side, samples = int(asked.data.split("x")[-1].split(":")[0]), int(asked.data.split(":")[-1])
    steps_per_epoch = samples // asked.batch_size
    base = ["--model", asked.model, "--data", asked.data, "--batch-size", str(asked.batch_size), "--epochs", "1"]
    script = plain(asked.model, side, asked.batch_size, asked.steps)
    rows = [row("plain script, glibc defaults", script["peak_bytes"], script["seconds_per_step"] * steps_per_epoch)]
    blocks = trgl([*base, "--budget", "4GB", "--modules", "999"], baseline="skip")
    most = int(str(blocks["message"]).rpartition("1 to ")[2].split()[0])  # the refusal says how many there can be
    finest = trgl([*base, "--budget", "4GB", "--modules", str(most)], baseline="measure")
    for name, title in (
        ("e2e", "end-to-end, this package's allocator and optimizer"),
        ("e2e_checkpoint", "the same, checkpointed"),
    ):
        measured = finest["baselines"][name]
        rows.append(row(title, measured["measured_peak_bytes"], measured["seconds_per_epoch"], measured["reason"]))
    rows.append(run_row(f"TRGL, one block a module ({most})", finest))
    for budget in asked.budgets.split(","):
        rows.append(run_row(f"TRGL, --budget {budget}", trgl([*base, "--budget", budget], baseline="skip")))
    record = {
        "workload": {"model": asked.model, "data": asked.data, "batch_size": asked.batch_size, "epochs": 1, "seed": 0},
        "environment": finest["environment"],
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("| | peak MB | of plain | s / epoch | |\n|---|---|---|---|---|")
    for entry in rows:
        peak = "-" if entry["peak_bytes"] is None else f"{entry['peak_bytes'] / 1e6:.0f}"
        share = "-" if entry["peak_bytes"] is None else f"{entry['peak_bytes'] / rows[0]['peak_bytes']:.2f}"
        seconds = "-" if entry["seconds_per_epoch"] is None else f"{entry['seconds_per_epoch']:.1f}"
        print(f"| {entry['name']} | {peak} | {share} | {seconds} | {entry['note']} |")


if __name__ == "__main__":
    main()
