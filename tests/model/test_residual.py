"""Which adds are residual, which operand is the branch, and what the shortcut is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ondevice_trgl.model.partition import partition
from ondevice_trgl.model.residual import Residual
from ondevice_trgl.model.zoo import build_model


class Net(nn.Module):
    """`block` between a stem and a classifier, on (B, 4, 6, 6)."""

    def __init__(self, block: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.block = block
        self.stem, self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.wide, self.project = nn.Conv2d(4, 8, 3, 2, padding=1), nn.Conv2d(4, 8, 1, 2)
        self.norm, self.norm_wide = nn.BatchNorm2d(4), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.position = nn.Parameter(torch.randn(1, 4, 6, 6))
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.pair = nn.Conv2d(2, 2, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc4, self.fc8 = nn.Linear(4, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self, self.stem(x))
        x = self.pool(x).flatten(1)
        return self.fc8(x) if self.block in WIDE else self.fc4(x)  # type: ignore[no-any-return]


def plain(net: Net, x: Tensor) -> Tensor:
    return x + net.b(net.relu(net.a(x)))  # type: ignore[no-any-return]


def swapped(net: Net, x: Tensor) -> Tensor:
    return net.b(net.relu(net.a(x))) + x  # type: ignore[no-any-return]


def by_method(net: Net, x: Tensor) -> Tensor:
    return net.a(x).add(x)  # type: ignore[no-any-return]


def in_place(net: Net, x: Tensor) -> Tensor:
    out = net.norm(net.a(x))
    out += x
    return net.relu(out)  # type: ignore[no-any-return]


def by_function(net: Net, x: Tensor) -> Tensor:
    return torch.add(functional.conv2d(x, net.kernel, padding=1), x)


def projected(net: Net, x: Tensor) -> Tensor:
    return net.project(x) + net.norm_wide(net.wide(net.relu(net.a(x))))  # type: ignore[no-any-return]


def padded(net: Net, x: Tensor) -> Tensor:
    return net.wide(x) + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, 4))  # type: ignore[no-any-return]


def dropped(net: Net, x: Tensor) -> Tensor:
    return x + net.drop(net.norm(net.a(x)))  # type: ignore[no-any-return]


def scaled(net: Net, x: Tensor) -> Tensor:
    return x + net.a(x) * net.scale  # type: ignore[no-any-return]


def parallel(net: Net, x: Tensor) -> Tensor:
    """One layer made of several, and the input: one branch."""
    return (net.a(x) + net.b(x)) + net.norm(x)  # type: ignore[no-any-return]


def grouped(net: Net, x: Tensor) -> Tensor:
    """Groups inside the branch take what the one before them gave."""
    first = net.a(x)
    one, two = net.pair(first[:, :2]), first[:, 2:]
    return net.b(torch.cat((one, net.pair(one + two)), 1)) + x  # type: ignore[no-any-return]


def positional(net: Net, x: Tensor) -> Tensor:
    return x + net.position


def twins(net: Net, x: Tensor) -> Tensor:
    return net.a(x) + net.b(x)  # type: ignore[no-any-return]


def doubled(net: Net, x: Tensor) -> Tensor:
    return x + x


def with_alpha(net: Net, x: Tensor) -> Tensor:
    return torch.add(x, net.a(x), alpha=0.5)


def shifted(net: Net, x: Tensor) -> Tensor:
    return net.a(x) + 1.0  # type: ignore[no-any-return]


def broadcast(net: Net, x: Tensor) -> Tensor:
    return x + net.pool(net.a(x))  # type: ignore[no-any-return]


WIDE = {projected, padded}


def residuals(block: Callable[[Net, Tensor], Tensor]) -> list[Residual]:
    parts = partition(Net(block), torch.randn(2, 4, 6, 6))
    return [residual for module in parts.modules for residual in module.branches]


@pytest.mark.parametrize(
    ("block", "branch", "kind", "norm"),
    [
        (plain, "b", "identity", None),
        (swapped, "b", "identity", None),
        (by_method, "a", "identity", None),
        (in_place, "norm", "identity", "net.norm"),
        (by_function, "conv2d", "identity", None),
        (projected, "norm_wide", "projection", "net.norm_wide"),
        (padded, "wide", "resized", None),
        (dropped, "drop", "identity", None),
        (scaled, "mul", "identity", None),
        (parallel, "add", "resized", None),
        (grouped, "b", "identity", None),
    ],
)
def test_the_heavier_operand_is_the_branch(
    block: Callable[[Net, Tensor], Tensor], branch: str, kind: str, norm: str | None
) -> None:
    (found,) = residuals(block)
    assert (found.branch.name, found.kind, found.norm) == (branch, kind, norm)


@pytest.mark.parametrize("block", [positional, twins, doubled, with_alpha, shifted, broadcast])
def test_other_adds_carry_no_transport(block: Callable[[Net, Tensor], Tensor]) -> None:
    assert residuals(block) == []


def test_a_norm_whose_output_is_used_elsewhere_is_measured_not_inferred() -> None:
    def reused(net: Net, x: Tensor) -> Tensor:
        r = net.norm(net.a(x))
        return (x + r) * r  # type: ignore[no-any-return]

    (found,) = residuals(reused)
    assert found.norm is None


def test_zoo_residual_networks_have_one_branch_a_block() -> None:
    for name, blocks in (("resnet-small", 6), ("resnet-preact-5x4", 5)):
        model = build_model(name, num_classes=3, in_shape=(1, 8, 8))
        parts = partition(model, torch.randn(2, 1, 8, 8), 2)
        branches = [residual for module in parts.modules for residual in module.branches]
        assert len(branches) == blocks
        assert all((residual.norm is not None) == (name == "resnet-small") for residual in branches)
        kinds = [residual.kind for residual in branches]
        assert kinds.count("projection") == (2 if name == "resnet-small" else 0)
