"""A cache that was asked to be in memory goes to disk when the budget shrinks below what it needs there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

APP = """
import hashlib, json, sys
import torch
from torch import nn
from torch.utils.data import TensorDataset
from ondevice_trgl import Callback, TrainConfig, Trainer

class Cut(Callback):
    seen = 0
    def on_step_end(self, run):
        self.seen += sys.argv[3] == "parallel" or run.module == 1
        if self.seen == 3 and "cut" in sys.argv:
            report = json.loads((trainer.run_dir / "plan.json").read_text())
            planned = max(ladder[0]["peak_bytes"] for ladder in report["ladders"])
            trainer.set_budget(planned - 70_000_000)

def block(width):
    return nn.Sequential(nn.Conv2d(width, 16, 1), nn.ReLU())

torch.manual_seed(0)
network = nn.Sequential(block(3), block(16), block(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
data = [TensorDataset(torch.randn(n, 3, 32, 32), torch.arange(n) % 4) for n in (1280, 64, 64)]
config = TrainConfig(
    budget="900MB", cache=sys.argv[1], modules=("0", "1", "2"), epochs=1, classifier_epochs=1, threads=1,
    head="pooled-linear", tau="off",
    schedule=sys.argv[3], freeze_until="0" if sys.argv[3] == "parallel" else None,
)
trainer = Trainer(network, config, run_dir=sys.argv[2], callbacks=[Cut()])
report = trainer.fit(*data)
weights = hashlib.sha256()
for name, value in trainer.export("last").state_dict().items():
    weights.update(name.encode() + value.numpy().tobytes())
print(json.dumps({"weights": weights.hexdigest(), "report": report.to_dict()}))
"""


def ran(folder: Path, *argv: str) -> Any:
    process = subprocess.run(
        [sys.executable, "-c", APP, argv[0], str(folder / "-".join(argv)), *argv[1:]],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_a_cache_in_memory_is_moved_to_disk_where_the_budget_shrinks(schedule: str, tmp_path: Path) -> None:
    cut = ran(tmp_path, "memory", schedule, "cut")
    report = cut["report"]
    assert report["status"] == "completed"
    (moved,) = [told for told in report["pressure"] if told["after"] == "cache on disk"]
    assert moved["before"] == "cache in memory"
    before, after = report["budgets"]
    assert before["measured_peak_bytes"] > after["budget_bytes"] >= after["measured_peak_bytes"]
    if schedule == "sequential":
        on_disk = ran(tmp_path, "disk", schedule)
        assert on_disk["report"]["pressure"] == []
        assert cut["weights"] == on_disk["weights"]
