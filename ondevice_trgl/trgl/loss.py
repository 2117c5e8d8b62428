"""The task loss of a batch: cross-entropy, and the weights that classes have in it; or a callable of the user's."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ondevice_trgl.config import CROSS_ENTROPY, TrainConfig
from ondevice_trgl.errors import ConfigError, UsageError, first_line
from ondevice_trgl.imported import found_here

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, classes), labels int64 (B,)) -> scalar, the mean over the samples."""


def task_loss(config: TrainConfig, labels: Tensor, classes: int) -> Loss:
    """The loss that `config` asks for, to train on `labels`. Raises ConfigError, UsageError."""
    if config.loss == CROSS_ENTROPY:
        weights = class_weights(config, labels, classes)
        return partial(cross_entropy, label_smoothing=config.label_smoothing, weights=weights)
    loss = _Checked(_imported(config.loss) if isinstance(config.loss, str) else config.loss, config.loss_name)
    loss.try_out(labels[:8], classes)
    return loss


class _Checked:
    """A loss of the user's, whose result is looked at every time."""

    def __init__(self, function: Loss, name: str) -> None:
        self._function, self._name = function, name

    def try_out(self, labels: Tensor, classes: int) -> None:
        """Raises UsageError where it does not take the labels of this work, or gives no loss."""
        logits = torch.zeros(len(labels), classes, requires_grad=True)
        with torch.random.fork_rng(devices=[]):
            try:
                self(logits, labels)
            except UsageError:
                raise
            except Exception as error:
                raise UsageError(
                    f"loss {self._name} raised {type(error).__name__}: {first_line(error)}",
                    hint=f"it is given logits of shape (B, {classes}) and whole numbers (B,), the classes",
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


def _imported(name: str) -> Loss:
    place, _, attribute = name.partition(":")
    try:
        with found_here():
            found: Any = importlib.import_module(place)
            for part in attribute.split("."):
                found = getattr(found, part)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise UsageError(
            f"loss {name!r} cannot be imported: {first_line(error)}",
            hint="write it as pkg.module:callable, importable from here",
        ) from error
    if not callable(found):
        raise UsageError(
            f"loss {name!r} is {type(found).__name__}, expected a callable", hint="name a function of (logits, labels)"
        )
    checked: Loss = found
    return checked


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
