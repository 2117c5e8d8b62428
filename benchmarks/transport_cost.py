"""What the transport cost adds to a module's step: bytes of tensors at the peak, and processor time.

Every module of each network trains in turn without the cost, with that of its branches, and with displacement, in an
order that changes from round to round, on the same weights and batch. Peaks are exact (every tensor that is alive in a
step, weights, gradients and optimizer state included); times are process time, so that other work on the machine counts
for little, as medians of the ratios within a round. Writes results/transport_cost.json.

    python benchmarks/transport_cost.py [--rounds 60] [--networks resnet20 ...]
"""

import argparse
import gc
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ondevice_trgl.device.allocator import tune
from ondevice_trgl.device.environment import describe_environment
from ondevice_trgl.model.heads import head_behind
from ondevice_trgl.model.partition import LocalModule, partition
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.plan.live_bytes import LiveBytes
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.trgl.step import Objective, train_step

RESULTS = Path(__file__).parent / "results" / "transport_cost.json"
KINDS = ("branch", "displacement")
CLASSES = 10


@dataclass(frozen=True)
class Network:
    """A model of the zoo, the shape of its input, the batch, and the modules that it is cut into."""

    model: str
    shape: tuple[int, int, int]
    batch: int
    modules: int


NETWORKS = {
    "resnet20": Network("resnet20", (3, 32, 32), 64, 3),
    "resnet-preact-10x16": Network("resnet-preact-10x16", (3, 28, 28), 32, 3),
    "resnet18": Network("resnet18", (3, 64, 64), 16, 3),
    "resnet50": Network("resnet50", (3, 64, 64), 16, 4),
    "mobilenet_v2": Network("mobilenet_v2", (3, 64, 64), 16, 4),
    "vit_b_16": Network("vit_b_16", (3, 224, 224), 2, 4),
}


class Bench:
    """One module under every objective, on shared weights."""

    def __init__(self, module: LocalModule, batch: int) -> None:
        torch.manual_seed(0)
        head = head_behind(module, "mlp", CLASSES)
        self.objectives = {
            kind: Objective(
                module,
                head,
                tau=10.0 if kind != "off" else None,
                transport=kind,
                transport_norm="mean",
                label_smoothing=0.1,
            )
            for kind in ("off", *KINDS)
        }
        for objective in self.objectives.values():
            objective.train_mode(True)
        self.optimizer = Optimizer("sgd", self.objectives["off"].parameters(), momentum=0.9, weight_decay=2e-4)
        self.batch = torch.randn(batch, *module.in_shape), torch.arange(batch) % CLASSES
        self.steady = sum(p.numel() * p.element_size() for p in self.optimizer.parameters.values())

    def step(self, kind: str) -> None:
        train_step(self.objectives[kind], self.optimizer, [self.batch], 1, 1e-6)

    def peak(self, kind: str) -> int:
        """Bytes of tensors at the highest point of a step; of weights and momentum beside what the step makes."""
        with LiveBytes() as live:
            self.step(kind)
            made = live.peak
        return made + 2 * self.steady + self.batch[0].numel() * self.batch[0].element_size()


def measure(module: LocalModule, batch: int, rounds: int) -> dict[str, Any]:
    """Shares by which each kind of cost raises peak and time of `module`."""
    bench = Bench(module, batch)
    kinds = ["off", *KINDS]
    for kind in kinds * 2:
        bench.step(kind)
    peaks = {kind: bench.peak(kind) for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        order.shuffle(kinds)
        for kind in kinds:
            started = time.process_time()
            bench.step(kind)
            seconds[kind].append(time.process_time() - started)
    gc.enable()
    row: dict[str, Any] = {
        "module": module.label,
        "branches": len(module.branches),
        "in_closed_form": sum(residual.norm is not None for residual in module.branches),
        "peak_bytes": peaks["off"],
        "cpu_seconds": statistics.median(seconds["off"]),
    }
    for kind in KINDS:
        ratios = [a / b for a, b in zip(seconds[kind], seconds["off"], strict=True)]
        row[kind] = {
            "measured": bench.objectives[kind].measures_transport,
            "peak_share": peaks[kind] / peaks["off"] - 1.0,
            "time_share": statistics.median(ratios) - 1.0,
            "time_share_of_medians": statistics.median(seconds[kind]) / row["cpu_seconds"] - 1.0,
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    asked = parser.parse_args()
    tune("system")
    record: dict[str, Any] = {
        "settings": {"rounds": asked.rounds, "classes": CLASSES, "optimizer": "sgd", "head": "mlp"},
        "environment": describe_environment(threads=torch.get_num_threads(), device="cpu"),
        "networks": [],
    }
    print("| network | module | kind | peak | time |\n|---|---|---|---|---|")
    for name in asked.networks:
        network = NETWORKS[name]
        torch.manual_seed(0)
        model = build_model(network.model, num_classes=CLASSES, in_shape=network.shape)
        rows = []
        # the last module of a run has a head as the others, and ends before the network's own classifier: left out here
        for module in partition(model, torch.randn(2, *network.shape), network.modules).modules[:-1]:
            rows.append(measure(module, network.batch, asked.rounds))
            for kind in KINDS:
                found = rows[-1][kind]
                print(
                    f"| {name} | {module.label} | {kind} | {found['peak_share']:+.2%} | {found['time_share']:+.1%} |",
                    flush=True,
                )
        record["networks"].append({**vars(network), "name": name, "measured": rows})
        record["summary"] = summary([row for one in record["networks"] for row in one["measured"]])
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record["summary"]))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The median module and the worst, by kind and figure."""
    return {
        kind: {
            figure: {"median": statistics.median(values), "worst": max(values)}
            for figure in ("peak_share", "time_share")
            for values in [[row[kind][figure] for row in rows]]
        }
        for kind in KINDS
    }


if __name__ == "__main__":
    main()
