"""Regression and multi-label of named data: from a table of pictures to figures, predictions and baselines."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ondevice_trgl import DataError
from ondevice_trgl.baseline import _measure
from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.job import BaselineRequest, Job
from ondevice_trgl.jobs import evaluate_run, predict_run
from ondevice_trgl.report.model import read_report
from ondevice_trgl.run.guards import global_state_kept
from tests.asked_here import train_job

pytestmark = pytest.mark.usefixtures("code_pages_kept")

Image = pytest.importorskip("PIL.Image")
MODEL = "resnet-preact-3x4"
SETTINGS: dict[str, Any] = {"budget": "64GB", "modules": 2, "epochs": 6, "threads": 1, "batch_size": 4, "lr": 0.02}


def table(folder: Path, count: int = 40, *, swapped: bool = False, seed: int = 0) -> Path:
    """Pictures as red and as blue as two targets say, of spread 1, and a table of them."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    columns = ["target_blue", "target_red"] if swapped else ["target_red", "target_blue"]
    lines = [f"path,{','.join(columns)}"]
    for index in range(count):
        red, blue = draw.uniform(-1.7, 1.7, 2)
        pixels = np.stack([np.full((8, 8), 128 + 60 * red), np.full((8, 8), 60), np.full((8, 8), 128 + 60 * blue)], 2)
        noise = draw.integers(-9, 10, (8, 8, 3))
        Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(folder / f"{index:02d}.png")
        values = {"target_red": red, "target_blue": blue}
        lines.append(",".join([f"{index:02d}.png", *(f"{values[name]:.6f}" for name in columns)]))
    path = folder / "numbers.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table, which is in `a`, and another table in `b`, its columns the other way round."""
    home = tmp_path_factory.mktemp("numbers")
    work = Workload(model=MODEL, data=f"csv:{table(home / 'a')}", image_size=8)
    job = Job(work, TrainConfig(task="regression", **SETTINGS), home / "run", baseline="skip")
    assert train_job(job).status == "completed"
    table(home / "b", 20, swapped=True, seed=1)
    return home


def test_columns_of_a_table_are_learned_and_measured_again_as_in_the_report(home: Path) -> None:
    report = read_report(home / "run")
    assert (report.metric, report.preprocessing["class_names"]) == ("r2", ["target_red", "target_blue"])
    assert "regression of 2 targets" in report.workload["description"]
    best = report.accuracy.best_head
    assert best is not None
    for head, index in (("best", best), ("last", len(report.heads) - 1), ("0", 0)):
        result = evaluate_run(home / "run", head=head)
        assert (result["metric"], result["matches_report"]) == ("r2", True)
        assert result["rmse"] == report.heads[index].test_rmse
    together = evaluate_run(home / "run", head="ensemble")
    assert together["rmse"] is None
    assert together["accuracy"] <= 1.0


def test_other_tables_are_matched_by_the_names_of_their_columns(home: Path) -> None:
    other = f"csv:{home / 'b' / 'numbers.csv'}"
    found = evaluate_run(home / "run", head="0", data=other)
    assert found["samples"] == 20
    assert found["accuracy"] > 0.5
    insisted = evaluate_run(home / "run", head="0", data=other, by_order=True)
    assert insisted["accuracy"] < found["accuracy"], "which is what was insisted on"


def test_predictions_are_numbers_by_the_names_of_the_targets(home: Path) -> None:
    for head in ("0", "ensemble"):
        result = predict_run(home / "run", [home / "b"], head=head)
        assert result["task"] == "regression"
        lines = (home / "b" / "numbers.csv").read_text(encoding="utf-8").splitlines()[1:]
        error = spread = 0.0
        for one, line in zip(result["predictions"], lines, strict=True):
            name, blue, red = line.split(",")
            assert Path(one["file"]).name == name
            assert list(one["values"]) == ["target_red", "target_blue"]
            error += (one["values"]["target_red"] - float(red)) ** 2 + (one["values"]["target_blue"] - float(blue)) ** 2
            spread += float(red) ** 2 + float(blue) ** 2
        assert error < 0.6 * spread
    json.dumps(result)


def test_a_run_of_numbers_is_not_measured_on_classes(home: Path, tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / "c" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "c" / name / "0.png")
    with pytest.raises(DataError, match="has class folders, and task = 'regression' needs numbers"):
        evaluate_run(home / "run", data=f"folder:{tmp_path / 'c'}")


@pytest.mark.long
def test_several_labels_are_trained_measured_and_named(tmp_path: Path) -> None:
    work = Workload(model=MODEL, data="synthetic:3x8x8:multi3:120")
    job = Job(work, TrainConfig(**SETTINGS), tmp_path / "run", baseline="skip")
    report = train_job(job)
    assert (report.metric, report.preprocessing["task"]) == ("f1", "multi-label")
    assert evaluate_run(tmp_path / "run")["matches_report"] is True
    Image.new("RGB", (8, 8), (200, 60, 60)).save(tmp_path / "one.png")
    (one,) = predict_run(tmp_path / "run", [tmp_path / "one.png"])["predictions"]
    assert sorted(one["confidences"]) == ["0", "1", "2"]
    assert one["labels"] == [name for name, share in one["confidences"].items() if share > 0.5]


@pytest.mark.parametrize("name", ["plain", "e2e", "e2e_checkpoint"])
@pytest.mark.parametrize("form", ["reg2", "multi2"])
def test_end_to_end_learns_the_same_and_is_judged_alike(tmp_path: Path, name: str, form: str) -> None:
    request = BaselineRequest(
        name=name,
        workload=Workload(model="resnet-preact-2x4", data=f"synthetic:1x8x8:{form}:120"),
        config=TrainConfig(**{**SETTINGS, "epochs": 4}),
        batch_size=8,
        scratch_dir=tmp_path,
        full=True,
    )
    with global_state_kept(1):
        report = _measure(request)
    assert report.status == "measured"
    assert report.val_accuracy is not None
    assert report.test_accuracy is not None
    assert 0.2 < report.test_accuracy <= 1.0
