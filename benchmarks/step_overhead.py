"""What the runtime adds to a training step: all that is not the module's forward and backward pass and its update.

ResNet-18 on 32x32 images, batch 32, trained whole and module by module from a disk cache under a budget that is
enforced. Reading the batch, keeping what a retry needs, watching the budget, callbacks and counting are the overhead.
Writes results/step_overhead.json.

    python benchmarks/step_overhead.py [--modules 1 4] [--samples 1280]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from ondevice_trgl import Callback, RunState, TrainConfig, Trainer
from ondevice_trgl._torchvision import torchvision_module
from ondevice_trgl.device.environment import describe_environment
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.trgl.step import Objective

RESULTS = Path(__file__).parent / "results" / "step_overhead.json"


class Stopwatch(Callback):
    """Seconds of each step, and of the work inside that any training has to do."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[float, float]]] = []
        self.work = 0.0
        self._ended: float | None = None

    def on_module_start(self, run: RunState) -> None:
        self.steps.append([])

    def on_epoch_start(self, run: RunState) -> None:
        self._ended, self.work = time.perf_counter(), 0.0

    def on_step_end(self, run: RunState) -> None:
        now = time.perf_counter()
        assert self._ended is not None
        self.steps[-1].append((now - self._ended, self.work))
        self._ended, self.work = time.perf_counter(), 0.0

    def timed(self, work: Any) -> Any:
        """`work`, its time counted."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.work += time.perf_counter() - started

        return run


def measure(modules: int, samples: int) -> dict[str, Any]:
    """One training of `modules` modules."""
    torch.manual_seed(0)
    model = torchvision_module().models.resnet18(num_classes=10)
    data = TensorDataset(torch.randn(samples, 3, 32, 32), torch.arange(samples) % 10)
    watch, backward, update = Stopwatch(), Objective.backward, Optimizer.step
    Objective.backward = watch.timed(backward)  # type: ignore[method-assign]
    Optimizer.step = watch.timed(update)  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory(prefix="trgl-bench-") as folder:
            config = TrainConfig(budget="4GB", modules=modules, epochs=2, batch_size=32)
            Trainer(model, config, run_dir=f"{folder}/run", callbacks=[watch]).fit(data)
    finally:
        Objective.backward, Optimizer.step = backward, update  # type: ignore[method-assign]
    rows = []
    for index, steps in enumerate(watch.steps):
        kept = steps[2:]  # the first ones warm up
        share = statistics.median((whole - work) / whole for whole, work in kept)
        seconds = statistics.median(whole for whole, _ in kept)
        rows.append({"module": index, "seconds_per_step": seconds, "overhead_share": share, "steps": len(kept)})
    every = [pair for steps in watch.steps for pair in steps[2:]]
    total = sum(whole - work for whole, work in every) / sum(whole for whole, _ in every)
    return {"modules": rows, "overhead_share": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--modules", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--samples", type=int, default=1280)
    asked = parser.parse_args()
    record: dict[str, Any] = {
        "workload": {"model": "resnet18", "image": "3x32x32", "batch_size": 32, "seed": 0},
        "environment": describe_environment(threads=torch.get_num_threads(), device="cpu"),
        "runs": [measure(modules, asked.samples) for modules in asked.modules],
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("| modules | module | ms a step | overhead |\n|---|---|---|---|")
    for run in record["runs"]:
        count = len(run["modules"])
        for row in run["modules"]:
            print(f"| {count} | {row['module']} | {1000 * row['seconds_per_step']:.1f} | {row['overhead_share']:.1%} |")
        print(f"| {count} | all | | {run['overhead_share']:.1%} |")


if __name__ == "__main__":
    main()
