"""The task loss of a batch: cross-entropy, and the weights that classes have in it."""

import torch
from torch import Tensor
from torch.nn import functional

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import ConfigError


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
