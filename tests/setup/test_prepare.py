"""Pictures are decoded before anything else is set up, while whoever waits for it is small."""

from pathlib import Path
from typing import Any

import pytest

from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.data import folders
from ondevice_trgl.errors import BudgetInfeasibleError
from ondevice_trgl.job import Job
from ondevice_trgl.setup import steps
from ondevice_trgl.setup.steps import set_up
from tests.asked_here import ask_here, plan_job

BUDGET = 500_000_000


class Asked:
    """Answers every request at once and keeps what it was given."""

    def __init__(self, refused_below: int = 0) -> None:
        self.names: list[str] = []
        self.prepared: list[dict[str, Any]] = []
        self.planned: dict[str, Any] = {}
        self._refused_below = refused_below

    def __call__(self, name: str, request: dict[str, Any], **more: Any) -> dict[str, Any]:
        self.names.append(name)
        if name == "prepare":
            self.prepared.append(request)
            if request["budget_bytes"] is not None and request["budget_bytes"] < self._refused_below:
                raise BudgetInfeasibleError(
                    "decoding large.png (8000x6000 pixels) takes 190 MiB",
                    budget_bytes=request["budget_bytes"],
                    smallest_feasible_budget_bytes=self._refused_below,
                    hint=f"the smallest feasible budget is {self._refused_below // 10**6}MB or more; or scale it down",
                )
            if more.get("told"):
                more["told"]("preparing 3 pictures: 100%")
            return {"stored": True, "peak_bytes": 222}
        if name == "plan":
            self.planned = request
        return {"peak_bytes": 111}


def job(tmp_path: Path, budget: int = BUDGET, **workload: Any) -> Job:
    (tmp_path / "pictures").mkdir(exist_ok=True)
    given = {"data": f"folder:{tmp_path / 'pictures'}", **workload}
    return Job(Workload(**given), TrainConfig(budget=budget, device="cpu"), tmp_path / "run")


def test_pictures_come_first_and_their_peak_counts(tmp_path: Path) -> None:
    asked, lines = Asked(), list[str]()
    set_up(job(tmp_path, image_size=32, orientation="stored"), tmp_path, asked, told=lines.append)
    assert asked.names == ["prepare", "stage", "plan"]
    (request,) = asked.prepared
    assert request["data"] == f"folder:{tmp_path / 'pictures'}"
    assert request["fit"] == {"channels": 3, "height": 32, "width": 32, "orientation": "stored"}
    assert request["budget_bytes"] == BUDGET
    assert request["caller_bytes"] > 10_000_000
    assert request["holder_bytes"] == 200_000_000
    assert request["tell"]
    assert asked.planned["set_up_bytes"] == 222
    assert lines == ["preparing 3 pictures: 100%"]


def test_nothing_is_told_to_who_does_not_listen(tmp_path: Path) -> None:
    asked = Asked()
    set_up(job(tmp_path), tmp_path, asked)
    assert not asked.prepared[0]["tell"]


@pytest.mark.parametrize("data", ["digits", "synthetic:3x8x8:2:32", "my.module:make"])
def test_other_data_need_no_preparing(tmp_path: Path, data: str) -> None:
    asked = Asked()
    set_up(job(tmp_path, data=data), tmp_path, asked)
    assert asked.names == ["stage", "plan"]
    assert asked.planned["set_up_bytes"] == 111


def test_the_budget_of_a_gpu_is_no_bound_on_this_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    monkeypatch.setattr(steps, "_on_gpu", lambda config: True)
    set_up(job(tmp_path), tmp_path, asked)
    assert asked.prepared[0]["budget_bytes"] is None
    assert asked.planned["set_up_bytes"] == 111


def test_a_picture_that_does_not_fit_is_refused_with_a_budget_that_was_tried(tmp_path: Path) -> None:
    asked = Asked(refused_below=300_000_000)
    with pytest.raises(BudgetInfeasibleError, match=r"large\.png \(8000x6000 pixels\)") as caught:
        set_up(job(tmp_path, budget=200_000_000), tmp_path, asked)
    assert caught.value.smallest_feasible_budget_bytes == 300_000_000
    assert caught.value.hint == "the smallest feasible budget is 300MB or more; or scale it down"
    assert asked.names == ["prepare", "prepare", "stage", "plan"]


def test_every_process_of_a_run_reads_what_the_first_has_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image")
    for label, name in enumerate("ab"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(10):
            image.new("RGB", (12, 9), (200 * label, 10 * index, 5)).save(tmp_path / "pictures" / name / f"{index}.png")
    names: list[str] = []

    def ask(name: str, request: dict[str, Any], **more: Any) -> dict[str, Any]:
        names.append(name)
        return ask_here(name, request, **more)

    def decoded_again(*given: Any, **more: Any) -> dict[str, Any]:
        raise AssertionError("it was decoded again")

    monkeypatch.setattr(folders, "ask", decoded_again)
    report = plan_job(job(tmp_path, 2_000_000_000, image_size=8, model="resnet-preact-1x4"), ask=ask)
    assert names == ["prepare", "stage", "plan"]
    assert report.status == "planned"
    assert report.workload["input_shape"] == [3, 8, 8]
