"""The task loss of a batch: that of its kind, and the weights that classes have in it; or a callable of the user's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import ConfigError, UsageError, first_line
from ondevice_trgl.imported import function_named
from ondevice_trgl.tasks import CLASSES, MULTI_LABEL, REGRESSION
from ondevice_trgl.trgl.task import Task

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs (B, T), labels int64 (B,) or targets float32 (B, T)) -> scalar, the mean over the samples."""


def task_loss(config: TrainConfig, labels: Tensor, task: Task) -> Loss:
    """The loss that `config` asks for, to train on `labels` or targets. Raises ConfigError, UsageError."""
    if not config.has_own_loss:
        return built_in(task, config.label_smoothing, weights_of(config, labels, task))
    loss = _Checked(_function(config), config.loss_name)
    loss.try_out(labels[:8], task)
    return loss


def built_in(task: Task, label_smoothing: float, weights: Tensor | None) -> Loss:
    """The task's own loss, the mean over samples and, of vectors, over their numbers too."""
    if task.kind == REGRESSION:
        return functional.mse_loss
    if task.kind == MULTI_LABEL:
        return partial(binary_cross_entropy, weights=weights)
    return partial(cross_entropy, label_smoothing=label_smoothing, weights=weights)


def weights_of(config: TrainConfig, labels: Tensor, task: Task) -> Tensor | None:
    """Of classes or, where they are there, of labels, float32 (outputs,); None: all alike. Raises ConfigError."""
    if task.kind == MULTI_LABEL:
        return positive_weights(config, labels)
    return class_weights(config, labels, task.outputs) if task.kind == CLASSES else None


class _Checked:
    """A loss of the user's, whose result is looked at every time."""

    def __init__(self, function: Loss, name: str) -> None:
        self._function, self._name = function, name

    def try_out(self, labels: Tensor, task: Task) -> None:
        """Raises UsageError where it does not take the labels of this work, or gives no loss."""
        logits = torch.zeros(len(labels), task.outputs, requires_grad=True)
        kind = "whole numbers (B,), the classes" if task.kind == CLASSES else f"float targets of (B, {task.outputs})"
        with torch.random.fork_rng(devices=[]):
            try:
                self(logits, labels)
            except UsageError:
                raise
            except Exception as error:
                raise UsageError(
                    f"loss {self._name} raised {type(error).__name__}: {first_line(error)}",
                    hint=f"it is given logits of shape (B, {task.outputs}) and {kind}",
                ) from error

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        found: Any = self._function(logits, labels)
        if not isinstance(found, Tensor):
            got = type(found).__name__
        elif found.ndim or not found.is_floating_point():
            got = f"a tensor of shape {tuple(found.shape)}, {found.dtype}"
        elif not found.requires_grad and logits.requires_grad:
            got = "a number that has no gradient"
        else:
            return found
        raise UsageError(
            f"loss {self._name} returned {got}",
            hint="return a scalar tensor made from the logits: the mean over samples",
        )


def _function(config: TrainConfig) -> Loss:
    given = config.loss
    return function_named(given, "loss", "logits, labels") if isinstance(given, str) else given


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float, weights: Tensor | None = None) -> Tensor:
    """Mean over the samples (B,) of their cross-entropy, logits (B, classes); weighted by class, (classes,).

    The sum is divided by the number of samples, not by that of their weights as torch does: so the mean over equal
    micro-batches is that of the batch.
    """
    if weights is None:
        return functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    weights = weights.to(logits)
    total = functional.cross_entropy(logits, labels, weight=weights, label_smoothing=label_smoothing, reduction="sum")
    return total / len(labels)


def binary_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over samples and labels, (B, T), of the cross-entropy of each; `weights` (T,) of labels that are there."""
    weights = None if weights is None else weights.to(logits)
    return functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)


def positive_weights(config: TrainConfig, targets: Tensor) -> Tensor | None:
    """Weight of each label where it is there, float32 (T,); None: 1 each. Raises ConfigError.

    "balanced": samples without it over samples with it, so that both weigh the same; 1 where all are alike.
    """
    asked = config.class_weights
    if asked is None:
        return None
    if isinstance(asked, str):
        there = targets.sum(0, dtype=torch.float64)
        varied = (there > 0) & (there < len(targets))
        return torch.where(varied, (len(targets) - there) / there.clamp(min=1.0), 1.0).float()
    if len(asked) != targets.shape[1]:
        raise ConfigError(
            [f"class_weights = {list(asked)}: {len(asked)} numbers, and the data have {targets.shape[1]} labels"],
            hint="give one for each label, in their order, or 'balanced'",
        )
    return torch.tensor(asked, dtype=torch.float32)


def class_weights(config: TrainConfig, labels: Tensor, classes: int) -> Tensor | None:
    """Weight of each class, float32 (classes,), with mean 1 over the training samples `labels`; None: all alike.

    So learning rate and tau mean what they mean without. "balanced" is as one over the number of a class's samples; one
    without any has 1. Raises ConfigError where there are not as many numbers as classes, or none counts.
    """
    asked = config.class_weights
    if asked is None:
        return None
    counts = torch.bincount(labels, minlength=classes).double()
    if isinstance(asked, str):
        present = counts > 0
        weights = torch.where(present, counts.sum() / (present.sum() * counts.clamp(min=1.0)), 1.0)
        return weights.float()
    if len(asked) != classes:
        raise ConfigError(
            [f"class_weights = {list(asked)}: {len(asked)} numbers, and the model has {classes} outputs"],
            hint="give one for each class, in the order of the classes, or 'balanced'",
        )
    weights = torch.tensor(asked, dtype=torch.float64)
    mean = float((weights * counts).sum() / counts.sum())
    if mean <= 0.0:
        raise ConfigError(
            [f"class_weights = {list(asked)}: all {len(labels)} training samples are of classes with weight 0"],
            hint="give a class that has samples a weight above 0",
        )
    return (weights / mean).float()
