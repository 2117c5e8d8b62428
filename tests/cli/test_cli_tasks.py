"""Tasks other than classes on the command line: what is asked for, and what figures look like."""

from typing import Any

import pytest

from ondevice_trgl.cli.progress import accuracies
from tests.cli.conftest import Cli, Jobs, State


def test_task_loss_and_metric_reach_the_job(cli: Cli, jobs: Jobs) -> None:
    flags = ("--task", "regression", "--loss", "mse", "--metric", "pkg.mod:own")
    assert cli("train", "-b", "600MB", "--data", "synthetic:1x8x8:reg2:40", *flags).code == 0
    config = jobs.jobs[0].config
    assert (config.task, config.loss, config.metric) == ("regression", "mse", "pkg.mod:own")


def test_what_does_not_go_together_is_a_usage_error(cli: Cli) -> None:
    result = cli("train", "-b", "600MB", "--task", "regression", "--class-weights", "balanced")
    assert result.code == 2
    assert "class_weights = balanced: task = 'regression' has no classes" in result.err
    result = cli("train", "-b", "600MB", "--task", "numbers")
    assert result.code == 2
    assert "auto | classes | regression | multi-label" in result.err


def test_the_forms_are_in_the_help(cli: Cli) -> None:
    shown = " ".join(cli("train", "--help").out.split())
    for word in ("--task", "--metric", "regT", "multiT"):
        assert word in shown


@pytest.mark.parametrize(
    ("metric", "rmse", "shown"),
    [("r2", 0.25, "R2 0.873 (RMSE 0.25) on"), ("f1", None, "F1 0.873 on"), ("pkg:own", None, "own 0.8725 on")],
)
def test_evaluate_writes_the_figure_of_the_task(
    cli: Cli, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, metric: str, rmse: float | None, shown: str
) -> None:
    result = jobs.evaluate_run

    def evaluate_run(*args: Any, **given: Any) -> dict[str, Any]:
        return {**result(*args, **given), "metric": metric, "rmse": rmse}

    monkeypatch.setattr(jobs, "evaluate_run", evaluate_run)
    out = cli("evaluate", "runs/r").out
    assert shown in out
    assert "%" not in out


@pytest.mark.parametrize(
    ("task", "predictions", "shown"),
    [
        ("regression", [{"file": "a.png", "values": {"width": 1.23456, "height": -0.5}}],
         [["file", "width", "height"], ["a.png", "1.235", "-0.5"]]),
        ("multi-label", [{"file": "a.png", "labels": ["x", "y"], "confidences": {"x": 0.9, "y": 0.6, "z": 0.1}},
                         {"file": "b.png", "labels": [], "confidences": {"x": 0.2, "y": 0.1, "z": 0.1}}],
         [["file", "label", "confidence"], ["a.png", "x", "90.0%"], ["y", "60.0%"], ["b.png", "none", "-"]]),
        ("regression", [], [["file"]]),
    ],
)  # fmt: skip
def test_predict_writes_numbers_and_the_labels_that_are_there(
    cli: Cli,
    jobs: Jobs,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    predictions: list[dict[str, Any]],
    shown: list[list[str]],
) -> None:
    result = jobs.predict_run

    def predict_run(*args: Any, **given: Any) -> dict[str, Any]:
        return {**result(*args, **given), "task": task, "predictions": predictions}

    monkeypatch.setattr(jobs, "predict_run", predict_run)
    lines = [line.split() for line in cli("predict", "runs/r", "a.png").out.splitlines()]
    start = lines.index(["Predictions"]) + 1
    assert lines[start : start + len(shown)] == shown


def test_progress_writes_figures_in_their_metric(state: State) -> None:
    assert accuracies(state(train_accuracy=0.5, val_accuracy=0.25)) == ["train 50.0%", "val 25.0%"]
    assert accuracies(state(train_accuracy=0.5, val_accuracy=-0.25, metric="r2")) == ["train 0.500", "val -0.250"]
