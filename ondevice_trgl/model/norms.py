"""Norms that compare values of a channel: which mix samples, and which refuse to train on too few of them.

torch trains no norm on one value a channel. A BatchNorm behind a pool to 1x1 has one of each sample, so that it needs
two samples at a time.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ondevice_trgl.model.heads import build_head
from ondevice_trgl.model.trace import Chain

_SAMPLES = 2
"""Samples that an auxiliary head is looked at with."""
_ON = 5
"""Where torch's functions say whether the statistics are those of the batch."""


@dataclass(frozen=True)
class Norm:
    """A layer that normalises over values of a channel."""

    name: str
    kind: str
    sides: tuple[int, ...] | None
    """Of its input behind the channels; None where that is not known."""
    least: int | None
    """Samples that it needs at a time in training; None where no number is enough."""
    mixes: bool
    """Whether what it gives depends on the other samples of the batch."""
    always: bool = False
    """Whether that holds in eval mode too."""

    def __str__(self) -> str:
        sides = "" if self.sides is None else f" at {'x'.join(map(str, self.sides)) or 'one position'}"
        return f"{self.name} ({self.kind}{sides})"


def batch_norms(module: nn.Module) -> Iterator[_BatchNorm]:
    """Every BatchNorm layer inside `module`."""
    yield from (layer for layer in module.modules() if isinstance(layer, _BatchNorm))


def norms_of(chain: Chain) -> tuple[tuple[Norm, ...], ...]:
    """By segment, its norms that mix samples or need more than one; reads shapes alone.

    Those that stay in eval mode do neither.
    """
    batch = next(node.meta["shape"][0] for node in chain.graph.nodes if node.op == "placeholder")
    return tuple(
        tuple(
            norm
            for node in segment.nodes
            for norm in _at(node, chain.model, batch)
            if norm.always or (segment.index >= chain.prefix and chain.modes.kept.get(norm.name) is not False)
        )
        for segment in chain.segments
    )


@functools.cache
def norms_of_head(
    name: str, shape: tuple[int, ...], classes: int, channel_axis: int | None = None, limit: int | None = None
) -> tuple[Norm, ...]:
    """The same of the auxiliary head that `build_head` makes of these. Raises UnknownNameError, PartitionError."""
    with torch.device("meta"):  # to be looked at: no tensor is made
        head = build_head(name, shape, classes, channel_axis, limit)
    if not any(isinstance(layer, _BatchNorm | nn.GroupNorm) for layer in head.modules()):
        return ()
    found, at = [], (_SAMPLES, *shape)
    for path, layer in head.named_children():
        norm = _layer(f"{path} of head {name!r}", layer, at, _SAMPLES)
        found += [] if norm is None else [norm]
        at = _behind(layer, at)
    return tuple(found)


def _behind(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that `layer` of a head gives. Nothing is computed: meta tensors would import sympy to do so, 80 MB."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        assert not isinstance(layer.padding, str)
        steps = zip(shape[2:], layer.kernel_size, layer.padding, layer.stride, layer.dilation, strict=True)
        return (shape[0], layer.out_channels, *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, p, s, d in steps))
    if isinstance(layer, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveAvgPool3d):
        sides: Any = layer.output_size
        return (*shape[:2], *(sides if isinstance(sides, tuple) else (sides,) * (len(shape) - 2)))
    if isinstance(layer, nn.Linear):
        return (*shape[:-1], layer.out_features)
    if isinstance(layer, _BatchNorm | nn.GroupNorm | nn.ReLU):
        return shape
    return tuple(layer(torch.zeros(()).expand(shape)).shape)  # what moves axes, of which one element is all there is


def _at(node: fx.Node, model: nn.Module, batch: int) -> Iterator[Norm]:
    inputs = node.all_input_nodes
    shape = inputs[0].meta.get("shape") if inputs else None
    if node.op == "call_module":
        target = model.get_submodule(str(node.target))
        for path, layer in target.named_modules(prefix=str(node.target)):
            # what a layer does inside is not seen: nor are shapes there
            norm = _layer(path, layer, shape if layer is target else None, batch)
            if norm is not None:
                yield norm
    elif node.op == "call_function" and shape is not None:
        norm = _function(node, shape, batch)
        if norm is not None:
            yield norm


def _layer(name: str, layer: nn.Module, shape: tuple[int, ...] | None, batch: int) -> Norm | None:
    kind = type(layer).__name__
    if isinstance(layer, _BatchNorm):
        always = layer.running_mean is None
        return _over_batch(name, kind, shape, batch, always=always) if always or _can_train(layer) else None
    if isinstance(layer, _InstanceNorm) and shape is not None:
        is_on = not layer.track_running_stats or _can_train(layer)
        return _over_space(name, kind, shape) if is_on else None
    if isinstance(layer, nn.GroupNorm) and shape is not None:
        return _over_groups(name, kind, shape, layer.num_groups, batch)
    return None


def _function(node: fx.Node, shape: tuple[int, ...], batch: int) -> Norm | None:
    kind = getattr(node.target, "__name__", "")
    if kind == "batch_norm":
        is_on = _argument(node, _ON, "training", False)  # or a node: the train mode
        return None if is_on is False else _over_batch(node.name, kind, shape, batch, always=is_on is True)
    if kind == "instance_norm":
        is_on = _argument(node, _ON, "use_input_stats", True) is not False
        return _over_space(node.name, kind, shape) if is_on else None
    if kind == "group_norm" and isinstance(groups := _argument(node, 1, "num_groups", None), int):
        return _over_groups(node.name, kind, shape, groups, batch)
    return None


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _over_batch(name: str, kind: str, shape: tuple[int, ...] | None, batch: int, *, always: bool) -> Norm:
    if shape is None:
        return Norm(name, kind, None, 2, True, always)
    values = math.prod(shape) // shape[1] if len(shape) > 1 else shape[0]
    return Norm(name, kind, shape[2:], _samples_for_two(values, batch), True, always)


def _over_space(name: str, kind: str, shape: tuple[int, ...]) -> Norm | None:
    return Norm(name, kind, shape[2:], None, mixes=False) if math.prod(shape[2:]) == 1 else None


def _over_groups(name: str, kind: str, shape: tuple[int, ...], groups: int, batch: int) -> Norm | None:
    """torch counts values over the whole batch, though it compares those of one sample."""
    least = _samples_for_two(math.prod(shape) // groups, batch)
    return Norm(name, kind, shape[2:], least, mixes=False, always=True) if least > 1 else None


def _samples_for_two(values: int, batch: int) -> int:
    """Samples that give two values, where `batch` give `values`."""
    return max(1, -(-2 * batch // max(1, values)))


def _can_train(layer: nn.Module) -> bool:
    """Whether train mode reaches `layer`: a frozen one may override `train`."""
    before = layer.training
    try:
        return layer.train(True).training
    finally:
        layer.training = before
