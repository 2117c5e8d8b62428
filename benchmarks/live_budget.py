"""A budget that is cut by 30 % in mid-epoch and raised again, and an app that takes 150 MB while training runs.

Each in a process of its own that embeds the library, with the C allocator as it comes; a sampler outside of it reads
its RSS every 5 ms, beside the kernel's own peaks in the report. Writes results/live_budget.json.

    python benchmarks/live_budget.py [--budget 700MB]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from ondevice_trgl.units import parse_size

RESULTS = Path(__file__).parent / "results" / "live_budget.json"

APP = """
import json, sys, threading, time
import torch
from torch.utils.data import TensorDataset
from ondevice_trgl import Callback, TrainConfig, Trainer
from ondevice_trgl._torchvision import torchvision_module

what, budget, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def images(count):
    return TensorDataset(
        torch.randn(count, 3, 128, 128, generator=torch.Generator().manual_seed(0)), torch.arange(count) % 10
    )

class App(Callback):
    held, refused = None, False
    def on_step_end(self, run):
        if what == "cut" and (run.module, run.step) == (0, 2):
            other = threading.Thread(target=trainer.set_budget, args=(budget * 7 // 10,))
            other.start()
            other.join()
        if what == "cut" and (run.module, run.step) == (1, 2):
            trainer.set_budget(budget)
        if what == "grow" and (run.module, run.step) == (0, 2):
            threading.Thread(target=self.grow).start()
    def grow(self):
        time.sleep(0.05)  # into the next step
        try:
            self.held = bytearray(150_000_000)
        except MemoryError:
            self.refused = True

app = App()
trainer = Trainer(
    lambda: torchvision_module().models.resnet50(num_classes=10),
    TrainConfig(budget=budget, epochs=1, batch_size=32, seed=0),
    run_dir=folder + "/run",
    callbacks=[app],
)
report = trainer.fit(images(32 * 4), images(32))
print(json.dumps({"refused": app.refused, "report": report.to_dict()}))
"""


def measure(what: str, budget: int) -> dict[str, Any]:
    """One app: what its report says, and the highest RSS that was seen from outside."""
    highest = 0
    with tempfile.TemporaryDirectory(prefix="trgl-bench-", dir=Path.cwd()) as folder:
        process = subprocess.Popen(
            [sys.executable, "-c", APP, what, str(budget), folder], stdout=subprocess.PIPE, text=True
        )
        seen, ended = psutil.Process(process.pid), threading.Event()

        def sample() -> None:
            nonlocal highest
            while not ended.is_set():
                try:
                    highest = max(highest, seen.memory_info().rss)
                except psutil.Error:
                    return
                time.sleep(0.005)

        sampler = threading.Thread(target=sample)
        sampler.start()
        out, _ = process.communicate()
        ended.set()
        sampler.join()
    if process.returncode:
        raise SystemExit(f"{what}: ended with status {process.returncode}")
    answer = json.loads(out.splitlines()[-1])
    report = answer["report"]
    return {
        "what": what,
        "budget_bytes": budget,
        "status": report["status"],
        "app_was_refused": answer["refused"],
        "measured_peak_bytes": report["measured_peak_bytes"],
        "sampled_peak_bytes": highest,
        "budgets": report["budgets"],
        "modules": [
            {name: module[name] for name in ("predicted_peak_bytes", "measured_peak_bytes", "micro_batch_size")}
            for module in report["modules"]
        ],
        "pressure": report["pressure"],
        "environment": report["environment"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--budget", default="700MB")
    budget = parse_size(parser.parse_args().budget)
    results = [measure(what, budget) for what in ("cut", "grow")]
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for one in results:
        stretches = one["budgets"] or [vars_of(one)]
        told = ", ".join(f"{s['measured_peak_bytes'] / 1e6:.0f} of {s['budget_bytes'] / 1e6:.0f} MB" for s in stretches)
        steps = "; ".join(
            f"module {p['module']} step {p['step']}: {p['before']} -> {p['after']}" for p in one["pressure"]
        )
        print(f"{one['what']}: {told}; seen from outside {one['sampled_peak_bytes'] / 1e6:.0f} MB; {steps}")


def vars_of(one: dict[str, Any]) -> dict[str, int]:
    return {name: one[name] for name in ("budget_bytes", "measured_peak_bytes")}


if __name__ == "__main__":
    main()
