"""Training on a GPU: inside the budget, by the plan, and bit for bit after a pause. Skipped where there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ondevice_trgl import BudgetInfeasibleError, Callback, Report, RunState, TrainConfig, Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MB = 1_000_000


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    for _ in range(6):
        layers += [nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


def samples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.randn(count, 3, 64, 64, generator=generator) + labels.view(-1, 1, 1, 1) * 0.5
    return TensorDataset(images, labels)


def fit(folder: Path, *, dropout: float = 0.0, resume: bool = False, callbacks: Any = (), **changes: Any) -> Report:
    settings: dict[str, Any] = {"budget": "1GB", "modules": 4, "epochs": 4, "batch_size": 16, "device": "cuda"}
    trainer = Trainer(network(dropout), TrainConfig(**{**settings, **changes}), run_dir=folder, callbacks=callbacks)
    return trainer.fit(samples(160, 1), samples(32, 2), resume=resume)


class PauseAt(Callback):
    def __init__(self, step: int) -> None:
        self._left = step

    def on_step_end(self, run: RunState) -> None:
        self._left -= 1
        if self._left == 0:
            run.request_pause()


@pytest.fixture(scope="module")
def ample(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return fit(tmp_path_factory.mktemp("ample") / "run", device="auto")


def test_it_learns_on_the_gpu_and_tells_what_that_took(ample: Report) -> None:
    assert ample.status == "completed"
    assert ample.budget_kind == "cuda"
    assert ample.environment["device"].startswith("cuda")
    assert ample.accuracy.best_head_val is not None
    assert ample.accuracy.best_head_val > 0.9
    assert ample.measured_peak_bytes is not None
    assert ample.measured_peak_bytes <= ample.budget_bytes
    system = ample.system
    assert 0 < system["gpu_allocated_bytes"] <= system["gpu_reserved_bytes"] == ample.measured_peak_bytes
    if "gpu_driver_bytes" in system:
        assert system["gpu_driver_bytes"] > system["gpu_reserved_bytes"] / 2


def test_the_plan_is_near_what_is_measured(ample: Report) -> None:
    for module in ample.modules:
        assert module.measured_peak_bytes is not None
        assert 0.7 < module.predicted_peak_bytes / module.measured_peak_bytes < 1.3


def test_a_tight_budget_is_held(tmp_path: Path, ample: Report) -> None:
    assert ample.measured_peak_bytes is not None
    floor = ample.floor_bytes
    budget = floor + int(0.6 * (ample.measured_peak_bytes - floor))
    report = fit(tmp_path / "run", budget=budget)
    assert report.status == "completed"
    assert report.measured_peak_bytes is not None
    assert report.measured_peak_bytes <= budget
    assert report.accuracy.best_head_val is not None
    assert report.accuracy.best_head_val > 0.9


def test_what_does_not_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    with pytest.raises(BudgetInfeasibleError) as refused:
        fit(tmp_path / "run", budget="12MB")
    smallest = refused.value.smallest_feasible_budget_bytes
    assert smallest > 12 * MB
    assert fit(tmp_path / "run", budget=smallest, modules="auto").status == "completed"


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_a_paused_run_resumes_bit_for_bit(tmp_path: Path, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    settings: dict[str, Any] = {"dropout": 0.2, "schedule": schedule, "epochs": 2}
    fit(tmp_path / "whole", **settings)
    assert fit(tmp_path / "part", callbacks=[PauseAt(3)], **settings).status == "paused"
    assert fit(tmp_path / "part", resume=True, **settings).status == "completed"
    whole, part = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "part"))
    assert whole == part


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_pinned_memory_and_disk_train_the_same(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    for tier in ("memory", "disk"):
        report = fit(tmp_path / tier, cache=tier, cache_dtype=dtype, epochs=2)
        assert report.plan.cache.tier == tier
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "disk"))
    assert one == other


def test_what_is_read_ahead_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ondevice_trgl.run import feed

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    fit(tmp_path / "ahead", epochs=2)
    sent = feed.Feed.micro_batches
    monkeypatch.setattr(
        feed.Feed, "micro_batches", lambda self, source, indices, following=(): sent(self, source, indices)
    )
    fit(tmp_path / "not", epochs=2)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("ahead", "not"))
    assert one == other
