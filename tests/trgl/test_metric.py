"""What heads are compared by, against the formulas; in batches it comes to the same as whole."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import ConfigError, UsageError
from ondevice_trgl.run.stalled import has_stalled
from ondevice_trgl.tasks import CLASSES, MULTI_LABEL, REGRESSION, format_gain, format_metric, metric_title
from ondevice_trgl.trgl.loss import positive_weights, task_loss
from ondevice_trgl.trgl.metric import OwnMetric
from ondevice_trgl.trgl.step import Tally
from ondevice_trgl.trgl.task import Score, Task

HERE = "tests.trgl.test_metric"
NUMBER = 3


def drawn(kind: str, rows: int = 40, outputs: int = 3) -> tuple[Tensor, Tensor]:
    """Outputs of a network, and what they should be."""
    source = torch.Generator().manual_seed(5)
    outputs_ = torch.randn(rows, outputs, generator=source)
    if kind == CLASSES:
        return outputs_, torch.arange(rows) % outputs
    targets = outputs_ + torch.randn(rows, outputs, generator=source)
    return outputs_, (targets > 0).float() if kind == MULTI_LABEL else 5.0 + 2.0 * targets


def scored(task: Task, outputs: Tensor, targets: Tensor, batch: int = 7, *, keep: bool = False) -> Score:
    score = task.score(targets, keep=keep)
    for start in range(0, len(targets), batch):
        score.add(outputs[start : start + batch], targets[start : start + batch])
    return score


def f1(outputs: Tensor, targets: Tensor) -> float:
    """By the definition, from precision and recall, label by label."""
    found: list[float] = []
    for seen, there in zip((outputs > 0).t().tolist(), targets.bool().t().tolist(), strict=True):
        hits = sum(a and b for a, b in zip(seen, there, strict=True))
        precision, recall = hits / sum(seen), hits / sum(there)
        found.append(2 * precision * recall / (precision + recall))
    return sum(found) / len(found)


def r2(outputs: Tensor, targets: Tensor) -> float:
    error = (outputs.double() - targets).square().mean(0)
    return float((1 - error / targets.double().var(0, correction=0)).mean())


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_r2_and_f1_are_those_of_their_definitions_in_any_batches(batch: int) -> None:
    outputs, targets = drawn(REGRESSION)
    score = scored(Task(REGRESSION, 3), outputs, targets, batch)
    assert score.value() == pytest.approx(r2(outputs, targets))
    assert score.rmse() == pytest.approx(math.sqrt(float(functional.mse_loss(outputs.double(), targets.double()))))
    outputs, targets = drawn(MULTI_LABEL)
    assert scored(Task(MULTI_LABEL, 3), outputs, targets, batch).value() == pytest.approx(f1(outputs, targets))


@pytest.mark.parametrize("kind", [CLASSES, REGRESSION, MULTI_LABEL])
def test_what_is_kept_are_predictions_and_they_are_judged_alike(kind: str) -> None:
    task, (outputs, targets) = Task(kind, 3), drawn(kind)
    score = scored(task, outputs, targets, keep=True)
    assert score.predictions is not None
    expected = {CLASSES: outputs.softmax(1), REGRESSION: outputs, MULTI_LABEL: outputs.sigmoid()}[kind]
    assert torch.allclose(score.predictions, expected)
    assert task.judged(score.predictions, targets) == pytest.approx(score.value())
    assert scored(task, outputs, targets).predictions is None


def test_a_target_that_never_varies_counts_as_met_or_not() -> None:
    targets = torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    assert scored(Task(REGRESSION, 2), targets, targets).value() == 1.0
    outputs = targets + torch.tensor([0.0, 0.5])
    assert scored(Task(REGRESSION, 2), outputs, targets).value() == 0.5


def test_a_label_that_is_neither_there_nor_seen_is_left_out() -> None:
    targets = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert scored(Task(MULTI_LABEL, 2), torch.tensor([[2.0, -1.0], [-2.0, -1.0]]), targets).value() == 1.0
    assert scored(Task(MULTI_LABEL, 2), torch.tensor([[2.0, 1.0], [-2.0, -1.0]]), targets).value() == 0.5
    assert scored(Task(MULTI_LABEL, 2), torch.full((2, 2), -1.0), torch.zeros(2, 2)).value() == 1.0


def shown_first(predictions: Tensor, targets: Tensor) -> Tensor:
    return predictions[0, 0] - targets.flatten()[0]


@pytest.mark.parametrize("given", [shown_first, f"{HERE}:shown_first"])
def test_a_metric_of_ones_own_is_given_the_whole_split(given: Any) -> None:
    config = TrainConfig(metric=given)
    task = Task.of(config, CLASSES, 3)
    assert task.metric == f"{HERE}:shown_first" == config.to_dict()["metric"]
    assert not task.counts_right
    outputs, targets = drawn(CLASSES)
    assert scored(task, outputs, targets).value() == pytest.approx(float(outputs.softmax(1)[0, 0]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("no_such_package:f", "metric 'no_such_package:f' cannot be imported: No module named 'no_such_package'"),
        (f"{HERE}:NUMBER", "is int, expected a callable"),
        (lambda predictions, targets: predictions, r"metric tests.*lambda> raised \w+Error: "),
        (lambda predictions, targets: math.nan, "returned nan; expected a number, larger is better"),
        (lambda predictions, targets: None, "raised TypeError"),
        (lambda predictions: 1.0, "raised TypeError"),
    ],
)
def test_what_is_no_metric_is_told_of_before_training(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        OwnMetric(given).try_out(torch.arange(12) % 3, 3)
    assert caught.value.hint


def test_a_metric_is_tried_on_samples_from_all_over_the_set() -> None:
    seen: list[Tensor] = []

    def metric(predictions: Tensor, targets: Tensor) -> float:
        seen.append(targets)
        return 0.0

    OwnMetric(metric).try_out(torch.arange(5000) // 2500, 2)
    assert len(seen[0]) <= 1024
    assert seen[0].unique().tolist() == [0, 1]


def test_losses_are_those_of_torch() -> None:
    outputs, targets = drawn(REGRESSION)
    assert task_loss(TrainConfig(), targets, Task(REGRESSION, 3))(outputs, targets) == functional.mse_loss(
        outputs, targets
    )
    outputs, targets = drawn(MULTI_LABEL)
    loss, plain = task_loss(TrainConfig(), targets, Task(MULTI_LABEL, 3)), functional.binary_cross_entropy_with_logits
    assert loss(outputs, targets) == plain(outputs, targets)
    weights = torch.tensor([1.0, 2.0, 0.5])
    weighed = task_loss(TrainConfig(class_weights=(1, 2, 0.5)), targets, Task(MULTI_LABEL, 3))
    assert weighed(outputs, targets) == plain(outputs, targets, pos_weight=weights)


def test_balanced_labels_weigh_as_much_there_as_not() -> None:
    targets = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    weights = positive_weights(TrainConfig(class_weights="balanced"), targets)
    assert weights is not None
    assert weights.tolist() == [3.0, 1.0, 1.0]
    assert positive_weights(TrainConfig(), targets) is None
    with pytest.raises(ConfigError, match="2 numbers, and the data have 3 labels"):
        positive_weights(TrainConfig(class_weights=(1, 2)), targets)


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def test_a_loss_of_ones_own_is_given_targets_and_one_for_classes_is_told_what_they_are() -> None:
    outputs, targets = drawn(REGRESSION)
    loss = task_loss(TrainConfig(loss=squared), targets, Task(REGRESSION, 3))
    assert loss(outputs, targets) == squared(outputs, targets)
    for wrong in (functional.multi_margin_loss, partial(functional.nll_loss)):
        with pytest.raises(UsageError, match="raised") as caught:
            task_loss(TrainConfig(loss=wrong), targets, Task(REGRESSION, 3))
        assert "float targets of (B, 3)" in caught.value.hint


def test_while_training_only_what_is_right_of_classes_is_counted() -> None:
    tally = Tally()
    tally.add(Tally(1.0, 0.0, 3, 4))
    assert tally.accuracy() == 0.75
    tally.add(Tally(1.0, 0.0, 0, 4, counted=False))
    assert tally.accuracy() is None


@pytest.mark.parametrize(
    ("heads", "metric", "stalled"),
    [
        ([0.8, 0.80, 0.81], "accuracy", True),  # 100 samples: the standard error is 0.04
        ([0.8, 0.80, 0.85], "accuracy", False),
        ([0.8, 0.80, 0.83], "r2", True),  # 2 sqrt(0.8 / 100) x 0.2 = 0.036
        ([0.8, 0.80, 0.84], "r2", False),
        ([-0.2, -0.3, -0.2], "r2", True),
        ([-0.2, -0.3, -0.1], "r2", False),
        ([0.8, 0.80, 0.81], "f1", True),
        ([0.8, 0.80, 0.80], "pkg:own", True),
        ([0.8, 0.80, 0.8001], "pkg:own", False),
        ([-7.0, -8.0, -6.0], "pkg:own", False),
    ],
)
def test_what_may_be_chance_depends_on_the_metric(heads: list[float], metric: str, stalled: bool) -> None:
    assert has_stalled(heads, 100, metric) is stalled


@pytest.mark.parametrize(
    ("value", "metric", "title", "shown", "gain"),
    [
        (0.8725, "accuracy", "accuracy", "87.2%", "87.2 points above"),
        (-0.25, "r2", "R2", "-0.250", "0.250 below"),
        (0.5, "f1", "F1", "0.500", "0.500 above"),
        (1234.5678, "pkg.mod:own", "own", "1235", "1235 above"),
        (0.0, "r2", "R2", "0.000", "equal"),
    ],
)
def test_figures_are_written_in_their_metric(value: float, metric: str, title: str, shown: str, gain: str) -> None:
    assert (metric_title(metric), format_metric(value, metric), format_gain(value, metric)) == (title, shown, gain)


def test_without_a_figure_nothing_is_written() -> None:
    assert format_metric(None, "r2") is None
    assert format_gain(None, "accuracy") == "equal"
