"""Auxiliary heads: from a boundary activation to logits, one for each module but the last.

Each takes a batch of activations whose channels are on any axis, (B, C, *space), (B, T, C), (B, H, W, C) or (B, C), and
returns (B, num_classes). A head is narrowed until it has no more parameters than what it stands behind, or 200 000.
"""

import math
import operator
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, fx, nn

from ondevice_trgl.errors import PartitionError, UnknownNameError
from ondevice_trgl.model.layout import axis_by_rank
from ondevice_trgl.model.store import parameter_count, shape_of

Shape = tuple[int, ...]

SMALL = 200_000
"""Parameters that any head may have."""
_NARROWEST = 32
_STEPS = 9


class Boundary(Protocol):
    """What a head stands behind: a segment or a local module."""

    @property
    def out_shape(self) -> Shape: ...
    @property
    def channel_axis(self) -> int: ...
    @property
    def head_limit(self) -> int: ...


class _ChannelsFirst(nn.Module):
    """Channels from `axis` of a sample to its front, so that one head serves all; sides beyond three become one."""

    def __init__(self, axis: int, sides: int) -> None:
        super().__init__()
        self.axis, self.sides = axis, sides

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.axis + 1, 1)
        return x if self.sides <= 3 else x.flatten(2)


def _pool(shape: Shape, size: int) -> list[nn.Module]:
    """Average pool to `size` a side where the layout has sides; sides that are smaller stay."""
    sides = tuple(min(size, side) for side in shape[1:])
    if not sides:
        return []
    pool: dict[int, Callable[[tuple[int, ...]], nn.Module]] = {
        1: lambda s: nn.AdaptiveAvgPool1d(s[0]),
        2: nn.AdaptiveAvgPool2d,
        3: nn.AdaptiveAvgPool3d,
    }
    return [pool[len(sides)](sides)]


def _flat_features(shape: Shape, size: int) -> int:
    features = shape[0]
    for side in shape[1:]:
        features *= min(size, side)
    return features


def _narrowed(width: int, step: int) -> int:
    """`width` halved `step` times, but not below 32."""
    return max(min(width, _NARROWEST), width >> step)


def _pooled_linear(shape: Shape, classes: int, step: int) -> list[nn.Module]:
    """Average over space, then linear: C·classes weights and next to no activations. There is no smaller one."""
    return [*_pool(shape, 1), nn.Flatten(), nn.Linear(shape[0], classes)]


def _conv(shape: Shape, classes: int, step: int) -> list[nn.Module]:
    """The paper's 1CNN: conv3x3 - ReLU - average pool - BN - flatten - linear. Keeps one more activation of C·space.

    A step halves the channels that the convolution puts out.
    """
    if len(shape) != 3:
        raise PartitionError(f"head 'conv' needs an activation (C, H, W), this one is {shape}", hint="use --head mlp")
    width = _narrowed(shape[0], step)
    return [
        nn.Conv2d(shape[0], width, 3, padding=1, bias=False),
        nn.ReLU(),
        *_pool(shape, 2),
        nn.BatchNorm2d(width),
        nn.Flatten(),
        nn.Linear(_flat_features((width, *shape[1:]), 2), classes),
    ]


def _mlp(shape: Shape, classes: int, step: int) -> list[nn.Module]:
    """Three linear layers, as the paper's 3LIN, after pooling so far that they see at most 1024 features (or C).

    At most 0.3 M weights for up to 1024 channels, and next to no activations. The first two steps halve the width, the
    third pools to half the side, and so on.
    """
    side = next((side for side in (4, 2) if _flat_features(shape, side) <= 1024), 1)
    side, step = max(1, side >> step // 3), step % 3 if side >> step // 3 else step
    features = _flat_features(shape, side)
    width = _narrowed(max(32, min(256, features // 2)), step)
    return [
        *_pool(shape, side),
        nn.Flatten(),
        nn.Linear(features, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    ]


def _three_linear(shape: Shape, classes: int, step: int) -> list[nn.Module]:
    """The paper's 3LIN: three linear layers on all that there is, each half as wide as the one before.

    A step halves the width of the first two: of a large activation the head stays large, C·space·32 at the least.
    """
    features = math.prod(shape)
    width = _narrowed(max(_NARROWEST, features // 2), step)
    narrow = max(min(width, _NARROWEST), width // 2)
    layers = [nn.Flatten(), nn.Linear(features, width), nn.ReLU(), nn.Linear(width, narrow), nn.ReLU()]
    return [*layers, nn.Linear(narrow, classes)]


def _mlp_sr(shape: Shape, classes: int, step: int) -> list[nn.Module]:
    """DGL's MLP-SR: pool to a quarter of the side, three 1x1 conv-BN-ReLU, pool to 2x2, three linear layers.

    A step halves the width of the linear layers and, from the third on, the channels of the convolutions.
    """
    if len(shape) != 3:
        raise PartitionError(f"head 'mlp-sr' needs an activation (C, H, W), this one is {shape}", hint="use --head mlp")
    channels = _narrowed(shape[0], max(0, step - 2))
    small = (channels, *(max(1, side // 4) for side in shape[1:]))
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(small[1:])]
    for into in (shape[0], channels, channels):
        layers += [nn.Conv2d(into, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    features = _flat_features(small, 2)
    width = _narrowed(features, min(step, 2))
    layers += [*_pool(small, 2), nn.Flatten()]
    for into in (features, width):
        layers += [nn.Linear(into, width), nn.ReLU()]
    return [*layers, nn.Linear(width, classes)]


_HEADS: dict[str, Callable[[Shape, int, int], list[nn.Module]]] = {
    "pooled-linear": _pooled_linear,
    "conv": _conv,
    "mlp": _mlp,
    "mlp-sr": _mlp_sr,
    "3lin": _three_linear,
}


def build_head(
    name: str, shape: Shape, classes: int, channel_axis: int | None = None, limit: int | None = None
) -> nn.Module:
    """Head `name` for activations of `shape` (without the batch). Raises UnknownNameError, PartitionError.

    `channel_axis` is counted in `shape`; None: (C, ...) or (T, C), by rank. Of the head and its narrower kin the widest
    that has at most `limit` parameters, or the narrowest.
    """
    if name not in _HEADS:
        raise UnknownNameError("head", name, _HEADS)
    axis = axis_by_rank(shape) if channel_axis is None else channel_axis
    sides = (*shape[:axis], *shape[axis + 1 :])
    front = (shape[axis], *(sides if len(sides) <= 3 else (math.prod(sides),)))
    step = 0 if limit is None else _step(_HEADS[name], front, classes, limit)
    layers = _HEADS[name](front, classes, step)
    return nn.Sequential(*([_ChannelsFirst(axis, len(sides))] if axis or len(sides) > 3 else []), *layers)


def _step(kind: Callable[[Shape, int, int], list[nn.Module]], front: Shape, classes: int, limit: int) -> int:
    """How often a head has to be narrowed. No tensor is made to count, and no random number drawn."""
    with torch.device("meta"):
        return next((s for s in range(_STEPS) if parameter_count(*kind(front, classes, s)) <= limit), _STEPS)


def head_behind(boundary: Boundary, name: str, classes: int) -> nn.Module:
    """Head `name` for what `boundary` puts out. Raises UnknownNameError, PartitionError."""
    return build_head(name, boundary.out_shape, classes, boundary.channel_axis, boundary.head_limit)


def head_limit(model: nn.Module, nodes: Iterable[fx.Node]) -> int:
    """Parameters that a head behind `nodes` may have: as many as those of the nodes' own, or 200 000."""
    own: dict[int, int] = {}
    for node in nodes:
        tensors: list[object] = []
        if node.op == "call_module":
            tensors += model.get_submodule(str(node.target)).parameters()
        read = [used for used in node.all_input_nodes if used.op == "get_attr"]
        tensors += [operator.attrgetter(str(used.target))(model) for used in read]
        own |= {id(t): math.prod(shape_of(t)) for t in tensors if isinstance(t, nn.Parameter)}
    return max(SMALL, sum(own.values()))
