"""Runs that torch refuses to train where one sample reaches a norm behind a pool to 1x1."""

import dataclasses
from typing import Any

import pytest
from torch import Tensor, nn

from ondevice_trgl import ConfigError, PartitionError
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.plan.planner import make_plan
from ondevice_trgl.setup import planning
from tests.run.conftest import CLASSES, Fit, samples

pytestmark = pytest.mark.usefixtures("code_pages_kept")


class Pooled(nn.Module):
    """(B, 1, 6, 6) -> (B, 3); `norm` sees 1x1."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        wide = [nn.Conv2d(8, 64, 1), nn.Tanh(), nn.Conv2d(64, 8, 1)]  # so that more samples take more memory
        self.block = nn.Sequential(nn.ReLU(), *wide, nn.AdaptiveAvgPool2d(1), norm)
        self.classifier = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.block(self.stem(x)).flatten(1))
        return out


def on_the_last_rung(*args: Any, **settings: Any) -> Plan:
    """The plan, with nothing left of each ladder but what the smallest budget would leave."""
    made = make_plan(*args, **{**settings, "measured": None})  # which is the same every time
    return dataclasses.replace(made, ladders=tuple(ladder[-1:] for ladder in made.ladders), breakdowns=())


@pytest.mark.parametrize(
    ("norm", "head"),
    [(nn.BatchNorm2d(8), "mlp"), (nn.GroupNorm(8, 8), "mlp"), (nn.Identity(), "mlp-sr")],
    ids=["batch", "group", "head"],
)
def test_the_last_rung_trains(fit: Fit, monkeypatch: pytest.MonkeyPatch, norm: nn.Module, head: str) -> None:
    monkeypatch.setattr(planning, "make_plan", on_the_last_rung)
    report = fit("run", model=Pooled(norm), modules=2, head=head, batch_size=4)
    assert report.status == "completed"
    assert min(module.micro_batch_size or 0 for module in report.modules) in (1, 2)
    assert all(module.test_accuracy is not None for module in report.modules)


@pytest.mark.parametrize("rows", [9, 13])
def test_samples_that_fill_no_batch_are_left_out_of_the_epoch(fit: Fit, rows: int) -> None:
    report = fit("run", model=Pooled(nn.BatchNorm2d(8)), modules=2, batch_size=4, train=samples(rows))
    assert report.status == "completed"
    events = (fit.path("run") / "events.jsonl").read_text()
    assert '"train_accuracy"' in events


def test_what_was_asked_for_is_refused_before_anything_trains(fit: Fit) -> None:
    settings: list[dict[str, Any]] = [{"batch_size": 1}, {"micro_batch": 1}]
    for changes in settings:
        with pytest.raises(ConfigError, match=r"block.5 \(BatchNorm2d at 1x1\)"):
            fit("run", model=Pooled(nn.BatchNorm2d(8)), modules=2, **changes)
    with pytest.raises(PartitionError, match=r"does not accept .*more than 1 spatial element"):
        fit("run", model=Pooled(nn.InstanceNorm2d(8, track_running_stats=True)), modules=2)
    assert not fit.path("run").exists()
