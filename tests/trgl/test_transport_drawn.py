"""The transport cost of drawn blocks, shapes and micro-batches against plain float64 autograd: values and gradients."""

import copy
import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from ondevice_trgl.model.partition import partition
from ondevice_trgl.trgl.transport import has_transport, with_transport


class Residual(nn.Module):
    """act(x + branch(x))."""

    def __init__(self, branch: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.branch, self.act = branch, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.branch(x))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Blocks that keep the shape, then one that does not."""

    def __init__(self, blocks: list[nn.Module], end: nn.Module) -> None:
        super().__init__()
        self.blocks, self.end = nn.Sequential(*blocks), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.blocks(x))  # type: ignore[no-any-return]


def conv(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.Tanh(), nn.Conv2d(c, c, 1))


def conv_norm(c: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c, eps=1e-10))


def preact(c: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(c), nn.Tanh(), nn.Conv2d(c, c, 3, padding=1))


def tokens(c: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(c), nn.Linear(c, 2 * c), nn.GELU(), nn.Linear(2 * c, c))


BRANCHES: dict[str, tuple[Callable[[int], nn.Module], Callable[[int, int, int], tuple[int, ...]]]] = {
    "convolutions": (conv, lambda c, h, w: (c, h, w)),
    "ends in BatchNorm, closed form": (conv_norm, lambda c, h, w: (c, h, w)),
    "pre-activation": (preact, lambda c, h, w: (c, h, w)),
    "tokens": (tokens, lambda c, h, w: (h * w, c)),
    "vectors": (tokens, lambda c, h, w: (c,)),
}
"""Branch by channels, and the shape of a sample by channels, height and width."""


def net_of(branch: str, depth: int, channels: int, shape: tuple[int, ...], *, relu: bool, seed: int) -> Net:
    torch.manual_seed(seed)
    make = BRANCHES[branch][0]
    blocks: list[nn.Module] = [Residual(make(channels), nn.ReLU() if relu else nn.Identity()) for _ in range(depth)]
    widen = nn.Conv2d(channels, 11, 1) if len(shape) == 3 else nn.Linear(channels, 11)  # keeps the last block apart
    end = nn.Sequential(widen, nn.Flatten(), nn.Linear(11 * math.prod(shape) // channels, 13))
    return Net(blocks, end)


def reference(net: Net, x: Tensor, kind: str, norm: str) -> Tensor:
    """The cost of float64 `net` written out: the mean of ||r||^2 over samples, summed over blocks."""
    places = [x]
    cost = torch.zeros((), dtype=torch.float64)
    for block in net.blocks:
        assert isinstance(block, Residual)
        places.append(block(places[-1]))
    for block, (into, out) in zip(net.blocks, pairwise(places), strict=True):
        assert isinstance(block, Residual)
        r = block.branch(into) if kind == "branch" else out - into
        squares = r.square().flatten(1).sum(1)
        cost = cost + squares.mean() / (r[0].numel() if norm == "mean" else 1)
    return cost


@pytest.mark.parametrize("kind", ["branch", "displacement"])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("draw", range(3))
def test_any_shape_in_any_micro_batches_equals_float64(branch: str, kind: str, draw: int) -> None:
    drawn = random.Random(f"{branch} {kind} {draw}")
    depth, channels, sides = drawn.randint(1, 3), drawn.randint(2, 9), (drawn.randint(2, 7), drawn.randint(2, 7))
    micro, parts, relu = drawn.randint(2, 5), drawn.randint(1, 3), drawn.random() < 0.5
    norm, seed = drawn.choice(["mean", "sum"]), drawn.randint(0, 1000)
    shape = BRANCHES[branch][1](channels, *sides)
    net = net_of(branch, depth, channels, shape, relu=relu, seed=seed)
    exact = copy.deepcopy(net).double()
    (module,) = partition(net, torch.randn(2, *shape), 1).modules
    assert has_transport(module, kind)
    measured = with_transport(module, kind, norm).train()
    exact.train()
    whole, expected = 0.0, torch.zeros((), dtype=torch.float64)
    for x in torch.randn(micro * parts, *shape).split(micro):
        _, cost = measured(x)
        (cost / parts).backward()
        whole += cost.item() / parts
        expected = expected + reference(exact, x.double(), kind, norm) / parts
    expected.backward()
    assert whole == pytest.approx(expected.item(), rel=1e-4)
    wanted = dict(exact.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in wanted.values() if p.grad is not None)
    for name, parameter in net.named_parameters():
        want = wanted[name].grad
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        exactly = torch.zeros_like(wanted[name]) if want is None else want
        assert torch.allclose(got.double(), exactly, rtol=1e-3, atol=1e-4 * largest), name
