"""Cross-entropy with weights of classes: torch's, but for what it is divided by."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import ConfigError, UsageError
from ondevice_trgl.trgl.loss import class_weights, cross_entropy, task_loss
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.trgl.step import Objective, accumulate
from ondevice_trgl.trgl.task import Task
from tests.trgl.test_step import batch, first_module, objective

LABELS = torch.tensor([0] * 6 + [1] * 2 + [3] * 4)


def test_balanced_weights_are_as_one_over_the_number_of_samples_with_mean_one() -> None:
    weights = class_weights(TrainConfig(class_weights="balanced"), LABELS, 4)
    assert weights is not None
    assert weights.tolist() == pytest.approx([12 / 18, 12 / 6, 1.0, 12 / 12])  # n / (classes that there are x count)
    assert float(weights[LABELS].mean()) == pytest.approx(1.0)


def test_stated_weights_are_scaled_to_mean_one_over_the_samples() -> None:
    weights = class_weights(TrainConfig(class_weights=(10, 20, 7, 0)), LABELS, 4)
    assert weights is not None
    assert weights.tolist() == pytest.approx([1.2, 2.4, 0.84, 0.0])
    assert float(weights[LABELS].mean()) == pytest.approx(1.0)
    assert class_weights(TrainConfig(), LABELS, 4) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1, 2, 3), r"class_weights = \[1, 2, 3\]: 3 numbers, and the model has 4 outputs"),
        ((0, 0, 5, 0), "all 12 training samples are of classes with weight 0"),
    ],
)
def test_weights_that_fit_neither_model_nor_data_are_refused(given: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        class_weights(TrainConfig(class_weights=given), LABELS, 4)
    assert caught.value.hint


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_it_is_the_weighted_sum_of_torch_over_the_number_of_samples(smoothing: float) -> None:
    logits, weights = torch.randn(12, 4, dtype=torch.float64), torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64)
    mean = functional.cross_entropy(logits, LABELS, weight=weights, label_smoothing=smoothing)  # over their weights
    expected = mean * weights[LABELS].sum() / 12
    assert float(cross_entropy(logits, LABELS, smoothing, weights)) == pytest.approx(float(expected))
    plain = functional.cross_entropy(logits, LABELS, label_smoothing=smoothing)
    assert torch.equal(cross_entropy(logits, LABELS, smoothing), plain)
    assert float(cross_entropy(logits, LABELS, smoothing, torch.ones(4))) == pytest.approx(float(plain))


@pytest.mark.parametrize("micro", [2, 4])
def test_micro_batches_of_any_classes_add_up_to_the_batch(micro: int) -> None:
    z, labels = batch()
    labels = labels.sort().values  # micro-batches of one class alone
    found = []
    for size in (12, micro):
        goal = Objective(
            first_module(), objective(first_module()).head, tau=None, transport="branch", transport_norm="mean",
            label_smoothing=0.0,
            loss=partial(cross_entropy, label_smoothing=0.1, weights=torch.tensor([0.2, 1.0, 3.0])),
        )  # fmt: skip
        parts = [(z[i : i + size], labels[i : i + size]) for i in range(0, 12, size)]
        tally = accumulate(goal, parts, 12 // size)
        found.append((tally.task_loss, [p.grad for p in Optimizer("sgd", goal.parameters()).parameters.values()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for whole, part in zip(found[0][1], found[1][1], strict=True):
        assert whole is not None
        assert part is not None
        assert torch.allclose(whole, part, atol=1e-6)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.multi_margin_loss(logits, labels)


NUMBER = 3
HERE = "tests.trgl.test_loss"


def test_a_loss_of_ones_own_comes_itself_or_by_name() -> None:
    logits = torch.randn(12, 4)
    for given in (margin, f"{HERE}:margin"):
        config = TrainConfig(loss=given)
        assert torch.equal(task_loss(config, LABELS, Task(outputs=4))(logits, LABELS), margin(logits, LABELS))
        assert config.to_dict()["loss"] == f"{HERE}:margin"
    assert TrainConfig(loss=partial(margin)).loss_name == "functools:partial"
    default = task_loss(TrainConfig(), LABELS, Task(outputs=4))(logits, LABELS)
    assert torch.equal(default, functional.cross_entropy(logits, LABELS, label_smoothing=0.1))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package:f", "cannot be imported: No module named 'no_such_package'"),
        (f"{HERE}:absent", "cannot be imported: .*absent"),
        (f"{HERE}:NUMBER", "is int, expected a callable"),
    ],
)
def test_a_name_that_is_no_loss_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        task_loss(TrainConfig(loss=name), LABELS, Task(outputs=4))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda logits, labels: 1.0, "returned float"),
        (lambda logits, labels: logits.square().mean(1), r"returned a tensor of shape \(8,\), torch.float32"),
        (lambda logits, labels: logits.detach().mean(), "returned a number that has no gradient"),
        (lambda logits, labels: functional.mse_loss(logits, labels), "raised RuntimeError: "),
        (lambda logits: logits.mean(), "raised TypeError: "),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_what_gives_no_loss_is_told_of_before_training(function: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        task_loss(TrainConfig(loss=function), LABELS, Task(outputs=4))
    assert HERE in caught.value.message
    assert "(B" in str(caught.value.hint) or "mean over samples" in str(caught.value.hint)
