"""Regression and multi-label from the data to the report: what is measured is what plain torch measures."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ondevice_trgl import ConfigError, DataError, PartitionError, Report, RunState, TrainConfig, UsageError
from ondevice_trgl.errors import NonFiniteError
from ondevice_trgl.report.html import to_html
from ondevice_trgl.report.model import read_report
from ondevice_trgl.report.table import plain
from ondevice_trgl.report.text import report_lines
from tests.asked_here import Trainer
from tests.run.conftest import At, Fit, config, net, samples

pytestmark = pytest.mark.usefixtures("code_pages_kept")

TARGETS = 2


def of_targets(outputs: int = TARGETS) -> nn.Module:
    """The network of the other tests with another classifier."""
    model = net()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12)
        model.classifier = nn.Linear(model.classifier.in_features, outputs)
    return model


def pictures(count: int, seed: int = 0, *, task: str = "regression") -> TensorDataset:
    """A row and a column, each as bright as its target."""
    source = torch.Generator().manual_seed(seed)
    targets = torch.randn(count, TARGETS, generator=source)
    targets = (targets > 0).float() if task == "multi-label" else targets
    images = 0.3 * torch.randn(count, 1, 6, 6, generator=source)
    images[:, 0, 2] += targets[:, :1]
    images[:, 0, :, 2] += targets[:, 1:]
    return TensorDataset(images, targets)


@dataclass
class Done:
    """A run with three modules and the own classifier behind them."""

    task: str
    trainer: Any
    report: Report

    def outputs(self, head: int, split: TensorDataset) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.trainer.export(head)(split.tensors[0])
        return found


@pytest.fixture(scope="module", params=["regression", "multi-label"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Done:
    task = request.param
    trainer = Trainer(of_targets(), config(task=task, epochs=4), run_dir=tmp_path_factory.mktemp(task) / "run")
    report = trainer.fit(*(pictures(count, seed, task=task) for seed, count in enumerate((90, 33, 30))))
    return Done(task, trainer, report)


def measured(task: str, outputs: Tensor, targets: Tensor) -> float:
    if task == "regression":
        return float((1 - (outputs - targets).square().mean(0) / targets.var(0, correction=0)).mean())
    hits, wrong = (((outputs > 0) & (targets > 0)).sum(0), ((outputs > 0) != (targets > 0)).sum(0))
    return float((2 * hits / (2 * hits + wrong)).mean())


def test_every_head_is_measured_as_plain_torch_does(done: Done) -> None:
    report = done.report
    assert (report.status, report.metric) == ("completed", {"regression": "r2", "multi-label": "f1"}[done.task])
    for seed, (split, count) in enumerate((("train", 90), ("val", 33), ("test", 30))):
        data = pictures(count, seed, task=done.task)
        for head in report.heads:
            outputs = done.outputs(head.index, data)
            assert tuple(outputs.shape) == (count, TARGETS)
            assert getattr(head, f"{split}_accuracy") == pytest.approx(
                measured(done.task, outputs, data.tensors[1]), abs=1e-4
            )
            rmse = getattr(head, f"{split}_rmse")
            error = float((outputs - data.tensors[1]).square().mean().sqrt())
            assert rmse == (pytest.approx(error, rel=1e-3) if done.task == "regression" else None)


def test_heads_are_compared_and_put_together_in_the_metric(done: Done) -> None:
    accuracy, data = done.report.accuracy, pictures(33, 1, task=done.task)
    scores = {head.index: head.val_accuracy for head in done.report.heads}
    assert accuracy.best_head_val == max(score for score in scores.values() if score is not None)
    assert accuracy.best_head is not None
    assert accuracy.test == done.report.heads[accuracy.best_head].test_accuracy
    outputs = [done.outputs(head.index, data) for head in done.report.heads]
    mean = torch.stack(outputs).mean(0) if done.task == "regression" else torch.stack(outputs).sigmoid().mean(0) - 0.5
    assert accuracy.ensemble_val == pytest.approx(measured(done.task, mean, data.tensors[1]), abs=1e-4)
    assert (accuracy.test_rmse is not None) == (done.task == "regression")
    assert accuracy.best_head_val > 0.5, "it can be learned"


def test_the_report_names_the_metric_and_writes_no_percent(done: Done) -> None:
    lines, title = plain(report_lines(done.report)), {"regression": "R2", "multi-label": "F1"}[done.task]
    text = next(line for line in lines if line.startswith(f"{title} "))
    assert re.search(r"best head by validation [01]\.\d{3} ", text)
    assert "%" not in text
    assert ("RMSE" in " ".join(lines)) == (done.task == "regression")
    assert any(line.startswith("targets" if done.task == "regression" else "labels") for line in lines)
    assert not any("accuracy" in line or line.startswith("classes") for line in lines)
    assert f"<dt>{title}</dt>" in to_html(done.report)
    assert read_report(Path(str(done.report.run_dir))) == done.report
    assert done.report.preprocessing["task"] == done.task


def test_a_report_from_before_there_were_other_metrics_is_of_accuracy(done: Done) -> None:
    record = json.loads(json.dumps(done.report.to_dict()))
    del record["metric"]
    assert Report.from_dict(record).metric == "accuracy"


def test_floats_are_taken_for_a_regression_and_the_plan_says_so(tmp_path: Path) -> None:
    plan = Trainer(of_targets(), config(), run_dir=tmp_path / "run").plan(pictures(26), pictures(9, 1))
    assert any("task regression, as the data have float targets, 2 a sample" in reason for reason in plan.reasons)
    stated = Trainer(of_targets(), config(task="regression"), run_dir=tmp_path / "run").plan(pictures(26))
    assert not any("task regression" in reason for reason in stated.reasons)


@pytest.mark.parametrize(
    ("hook", "number", "settings"),
    [("on_step_end", 4, {}), ("on_epoch_end", 3, {"schedule": "parallel"}), ("on_module_end", 2, {"patience": 1})],
)
def test_a_paused_regression_goes_on_bit_for_bit(fit: Fit, hook: str, number: int, settings: dict[str, Any]) -> None:
    given: dict[str, Any] = {"train": pictures(26), "val": pictures(9, 1), "test": pictures(9, 2), **settings}
    whole = fit("whole", model=of_targets(), **given)
    pause = At(hook, number, RunState.request_pause)
    assert fit("part", model=of_targets(), callbacks=[pause], **given).status == "paused"
    resumed = fit("part", model=of_targets(), resume=True, **given)
    assert fit.weights("part") == fit.weights("whole")
    assert [head.val_rmse for head in resumed.heads] == [head.val_rmse for head in whole.heads]
    assert resumed.accuracy == whole.accuracy


def test_all_modules_side_by_side_and_one_after_another_give_figures_of_one_kind(fit: Fit) -> None:
    given: dict[str, Any] = {"train": pictures(26), "val": pictures(9, 1), "test": None}
    report = fit("run", model=of_targets(), schedule="multi-lap", laps=2, stop_when="never", cache="memory", **given)
    assert all(head.val_rmse is not None and head.test_rmse is None for head in report.heads)


@pytest.mark.parametrize(
    ("data", "model", "settings", "error", "message"),
    [
        (pictures(26), 3, {}, DataError, "the train set has 2 targets a sample, the model has 3 outputs"),
        (TensorDataset(pictures(26).tensors[0], torch.full((26, 2), 0.5)), 2, {}, DataError,
         "all 26 targets of the train set are 0.5, 0.5: there is nothing to learn"),
        (samples(26), 3, {"task": "regression"}, DataError, "whole; expected floats"),
        (pictures(26), 2, {"task": "classes"}, DataError, "expected a whole number"),
        (pictures(26, task="multi-label"), 2, {}, DataError, "vectors of 0 and 1"),
        (pictures(26), 2, {"label_smoothing": 0.0}, ConfigError, "label_smoothing = 0.0: task = 'regression' has no"),
        (pictures(26), 2, {"class_weights": "balanced"}, ConfigError, "class_weights = 'balanced'|class_weights = bal"),
        (pictures(26), 2, {"balance": True}, ConfigError, "balance = True: task = 'regression' has no classes"),
        (pictures(26, task="multi-label"), 2, {"task": "multi-label", "class_weights": (1, 2, 3)}, ConfigError,
         "3 numbers, and the data have 2 labels"),
        (samples(26), 3, {"metric": lambda predictions, targets: None}, UsageError, "metric .* raised TypeError"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_before_training(
    fit: Fit, data: Any, model: int, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        fit("run", model=of_targets(model), train=data, val=None, test=None, **settings)
    assert str(caught.value)
    assert not fit.path("run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "regresion"}, "did you mean 'regression'"),
        ({"task": "regression", "loss": "cross-entropy"}, "loss = 'cross-entropy': task = 'regression' has mse"),
        ({"task": "classes", "loss": "bce"}, "loss = 'bce': task = 'classes' has cross-entropy"),
        ({"task": "multi-label", "label_smoothing": 0.2}, "label_smoothing = 0.2: task = 'multi-label' has no classes"),
        ({"loss": "mse", "class_weights": "balanced"}, "class_weights = balanced: task = 'regression' has no classes"),
        ({"task": "multi-label", "balance": True}, "balance = True: task = 'multi-label' has no classes"),
        ({"metric": "r2"}, "metric = 'r2': expected auto, pkg.module:callable"),
        ({"metric": 3}, "metric = 3: expected auto"),
    ],
)
def test_settings_that_no_data_would_go_with_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_a_loss_that_one_task_has_alone_says_which_that_is() -> None:
    assert TrainConfig(loss="bce").asked_task == "multi-label"
    assert TrainConfig(loss="mse").asked_task == "regression"
    assert TrainConfig().asked_task == TrainConfig(loss="pkg.mod:own").asked_task == "auto"


class Squeezed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out.squeeze(-1)


def one_target(scale: float = 1.0) -> TensorDataset:
    images, targets = pictures(26).tensors
    return TensorDataset(images, scale * targets[:, 0])


def test_one_number_a_sample_is_a_column(fit: Fit) -> None:
    assert fit("run", model=of_targets(1), train=one_target(), val=None, test=None).metric == "r2"
    with pytest.raises(PartitionError, match=r"Squeezed returns a tensor of shape \(2,\)") as caught:
        fit("other", model=Squeezed(of_targets(1)), train=one_target(), val=None, test=None)
    assert "(batch, 1): leave squeeze out" in caught.value.hint


def test_targets_that_are_far_apart_are_told_of_where_the_loss_ends_in_nan(fit: Fit) -> None:
    with pytest.raises(NonFiniteError) as caught:
        fit("run", model=of_targets(1), train=one_target(1e6), val=None, test=None, lr=10.0)
    assert "the targets have a spread of" in caught.value.hint
    assert "scale them to about 1" in caught.value.hint


def worst_last(predictions: Tensor, targets: Tensor) -> float:
    """Of classes: the mean probability of the right one, less 10."""
    return float(predictions.gather(1, targets[:, None]).mean()) - 10.0


def test_a_metric_of_ones_own_chooses_the_head_and_is_named(fit: Fit) -> None:
    report = fit("run", metric=worst_last)
    assert report.metric == "tests.run.test_tasks:worst_last"
    values = [head.val_accuracy for head in report.heads]
    assert all(value is not None and -10.0 < value < -9.0 for value in values)
    assert report.accuracy.best_head_val == max(value for value in values if value is not None)
    assert any(line.startswith("worst_last") for line in plain(report_lines(report)))
    # it decides nothing about the weights
    plainly = fit("plain")
    assert fit.weights("run") == fit.weights("plain")
    assert plainly.metric == "accuracy"


def test_what_a_metric_is_given_is_counted_in_the_plan(tmp_path: Path) -> None:
    peaks = []
    for metric in ("auto", worst_last):
        trainer = Trainer(net(), config(metric=metric, enforce=False), run_dir=tmp_path / "run")
        plan = trainer.plan(samples(26), samples(9, 1))
        peaks.append([rung.peak_bytes - plan.floor_bytes for rung in plan.rungs])
        beside = 4 * 9 * 3 + (0 if metric == "auto" else 4 * (26 + 9) * 3)
        assert all(one["activations"] >= beside for one in map(vars, plan.predicted_breakdowns))


def test_a_run_from_when_there_was_one_loss_goes_on(fit: Fit) -> None:
    """Its record says cross-entropy, where now nothing need be said, and knows of no task."""
    fit("whole")
    fit("part", callbacks=[At("on_step_end", 4, RunState.request_pause)])
    path = fit.path("part") / "config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["config"]["loss"] = "cross-entropy"
    for name in ("task", "metric"):
        del record["config"][name]
    del record["preprocessing"]["task"]
    path.write_text(json.dumps(record), encoding="utf-8")
    assert fit("part", resume=True).status == "completed"
    assert fit.weights("part") == fit.weights("whole")


def test_callbacks_are_told_the_metric(fit: Fit) -> None:
    seen: list[RunState] = []
    look: Callable[[RunState], None] = seen.append
    callbacks = [At("on_step_end", 1, look), At("on_module_end", 1, look)]
    fit("run", model=of_targets(), train=pictures(26), val=pictures(9, 1), callbacks=callbacks, test=None)
    step, end = seen
    assert (step.metric, end.metric) == ("r2", "r2")
    assert step.train_accuracy is None
    assert step.task_loss is not None
    assert end.train_accuracy is not None
    assert end.val_accuracy is not None
