"""A planner that is wrong on purpose: by how much it was told, and it says so."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ondevice_trgl import TrainConfig, UsageError
from ondevice_trgl.config import Workload
from ondevice_trgl.job import Job
from ondevice_trgl.model.store import evict
from ondevice_trgl.model.trace import Chain, trace
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.plan.costs import Costs
from ondevice_trgl.plan.estimate import estimate
from ondevice_trgl.plan.falsify import VARIABLE, estimate_scale
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.plan.planner import LEAST_SCRATCH, make_plan
from ondevice_trgl.setup import planning
from ondevice_trgl.setup.rehearse import Rehearsals
from tests.asked_here import Trainer, plan_job

FLOOR = 100_000_000


@pytest.mark.parametrize(("environment", "scale"), [({}, 1.0), ({VARIABLE: "0.7"}, 0.7)])
def test_the_scale_is_what_the_environment_says(environment: dict[str, str], scale: float) -> None:
    assert estimate_scale(environment) == scale


@pytest.mark.parametrize("text", ["", "much", "0", "-1", "nan", "inf"])
def test_a_scale_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=VARIABLE):
        estimate_scale({VARIABLE: text})


def parts() -> tuple[Chain, Costs]:
    torch.manual_seed(0)
    model = build_model("resnet-preact-3x4", num_classes=3, in_shape=(1, 16, 16))
    chain = trace(model, torch.randn(2, 1, 16, 16))
    costs = estimate(chain, TrainConfig())
    evict(chain.model)
    return chain, costs


def plan(scale: float) -> Plan:
    chain, costs = parts()
    settings: dict[str, Any] = {"rows": 80, "train_rows": 60, "scratch": LEAST_SCRATCH, "scale": scale}
    return make_plan(chain, costs, TrainConfig(modules=3), budget_bytes=10**9, floor_bytes=FLOOR, **settings)


def test_what_is_above_the_floor_is_scaled_and_the_plan_says_so() -> None:
    true, false = plan(1.0), plan(0.7)
    assert true.bounds == false.bounds
    for right, wrong in zip(true.predicted_peak_bytes, false.predicted_peak_bytes, strict=True):
        assert wrong - FLOOR == pytest.approx(0.7 * (right - FLOOR), abs=2)
    assert [reason for reason in false.reasons if VARIABLE in reason] == [false.reasons[-1]]
    assert "0.7" in false.reasons[-1]
    assert not any(VARIABLE in reason for reason in true.reasons)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rehearsals fail, and so does whoever looks for figures of earlier ones."""

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing may be measured or remembered")

    monkeypatch.setenv(VARIABLE, "0.7")
    monkeypatch.setattr(Rehearsals, "_measure", never)
    monkeypatch.setattr("ondevice_trgl.plan.memo.is_lasting", never)  # asked before the folder is looked at


@pytest.mark.usefixtures("refused")
def test_the_process_that_plans_has_it_from_the_environment(tmp_path: Path) -> None:
    config = TrainConfig(budget="64GB", modules=3, epochs=1, threads=1)
    workload = Workload(model="resnet-preact-3x4", data="synthetic:1x8x8:3:60")
    report = plan_job(Job(workload, config, tmp_path / "run", baseline="skip"))
    assert VARIABLE in report.plan.reasons[-1]


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("in_process", [False, True])
def test_an_app_has_it_too(in_process: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ondevice_trgl.trainer._LEAST_ROOM_BYTES", 10**15 if in_process else 0)
    called = []
    make = planning.plan_staged

    def plan_staged(*args: Any, **kwargs: Any) -> Plan:
        called.append("here" if "set_up" not in kwargs else "asked")
        return make(*args, **kwargs)

    for module in ("ondevice_trgl.trainer", "ondevice_trgl.setup.planning"):
        monkeypatch.setattr(f"{module}.plan_staged", plan_staged)
    images = torch.utils.data.TensorDataset(torch.randn(60, 1, 8, 8), torch.arange(60) % 3)
    model = build_model("resnet-preact-3x4", num_classes=3, in_shape=(1, 8, 8))
    config = TrainConfig(budget="64GB", modules=3, epochs=1, threads=1)
    made = Trainer(model, config, run_dir=tmp_path / "run").plan(images)
    assert called == ["here" if in_process else "asked"]
    assert VARIABLE in made.reasons[-1]
