"""Auxiliary heads: from a boundary activation to logits, one for each module but the last.

Each takes (B, C, *space) for images, (B, T, C) for tokens or (B, C) for vectors and returns (B, num_classes).
"""

from collections.abc import Callable

from torch import Tensor, nn

from ondevice_trgl.errors import PartitionError, UnknownNameError

Shape = tuple[int, ...]


class _Tokens(nn.Module):
    """(B, T, C) -> (B, C, T), so that the pooled heads serve tokens too."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


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


def _pooled_linear(shape: Shape, classes: int) -> list[nn.Module]:
    """Average over space, then linear: C·classes weights and next to no activations."""
    return [*_pool(shape, 1), nn.Flatten(), nn.Linear(shape[0], classes)]


def _conv(shape: Shape, classes: int) -> list[nn.Module]:
    """The paper's 1CNN: conv3x3 - ReLU - average pool - BN - flatten - linear. Keeps one more activation of C·space."""
    if len(shape) != 3:
        raise PartitionError(f"head 'conv' needs an activation (C, H, W), this one is {shape}", hint="use --head mlp")
    channels = shape[0]
    return [
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        nn.ReLU(),
        *_pool(shape, 2),
        nn.BatchNorm2d(channels),
        nn.Flatten(),
        nn.Linear(_flat_features(shape, 2), classes),
    ]


def _mlp(shape: Shape, classes: int) -> list[nn.Module]:
    """The paper's 3LIN: three linear layers, after pooling so far that they see at most 1024 features (or C).

    At most 0.3 M weights for up to 1024 channels, and next to no activations.
    """
    side = next((side for side in (4, 2) if _flat_features(shape, side) <= 1024), 1)
    features = _flat_features(shape, side)
    width = max(32, min(256, features // 2))
    return [
        *_pool(shape, side),
        nn.Flatten(),
        nn.Linear(features, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    ]


def _mlp_sr(shape: Shape, classes: int) -> list[nn.Module]:
    """DGL's MLP-SR: pool to a quarter of the side, three 1x1 conv-BN-ReLU, pool to 2x2, three linear layers."""
    if len(shape) != 3:
        raise PartitionError(f"head 'mlp-sr' needs an activation (C, H, W), this one is {shape}", hint="use --head mlp")
    channels = shape[0]
    small = (channels, *(max(1, side // 4) for side in shape[1:]))
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(small[1:])]
    for _ in range(3):
        layers += [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    width = _flat_features(small, 2)
    layers += [*_pool(small, 2), nn.Flatten()]
    for _ in range(2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return [*layers, nn.Linear(width, classes)]


_HEADS: dict[str, Callable[[Shape, int], list[nn.Module]]] = {
    "pooled-linear": _pooled_linear,
    "conv": _conv,
    "mlp": _mlp,
    "mlp-sr": _mlp_sr,
}


def build_head(name: str, shape: Shape, classes: int) -> nn.Module:
    """Head `name` for activations of `shape` (without the batch). Raises UnknownNameError, PartitionError."""
    if name not in _HEADS:
        raise UnknownNameError("head", name, _HEADS)
    if len(shape) == 2:  # (T, C)
        return nn.Sequential(_Tokens(), *_HEADS[name]((shape[1], shape[0]), classes))
    return nn.Sequential(*_HEADS[name](shape, classes))
