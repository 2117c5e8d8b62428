"""The lean updates equal torch's own optimizers, and drop every gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ondevice_trgl.plan.live_bytes import LiveBytes
from ondevice_trgl.trgl.optim import Optimizer

KINDS = [("sgd", 0.9), ("sgd", 0.0), ("adamw", 0.9)]


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, bias=False)  # ahead of a norm its gradient would be rounding, which AdamW magnifies
    return nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).to(dtype)


def groups(model: nn.Module, decay: float) -> list[dict[str, object]]:
    """Weight decay on matrices and kernels alone."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def train(model: nn.Module, step: Callable[[float], None], steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(1)
    for i in range(steps):
        x = torch.randn(6, 2, 4, 4, generator=generator)
        model(x.to(next(model.parameters()).dtype)).square().mean().backward()
        step(0.1 / (1 + i))


def reference(kind: str, momentum: float, decay: float, model: nn.Module) -> nn.Module:
    """`model`, trained by torch's own class, in its plainest form."""
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(groups(model, decay), lr=0.1, momentum=momentum, foreach=False)
    else:
        optimizer = torch.optim.AdamW(groups(model, decay), lr=0.1, foreach=False)

    def step(lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()

    train(model, step)
    return model


def lean(model: nn.Module, kind: str, momentum: float, decay: float) -> Optimizer:
    return Optimizer(kind, dict(model.named_parameters()), momentum=momentum, weight_decay=decay)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("kind", "momentum"), KINDS)
def test_several_steps_equal_torchs_own(
    kind: str, momentum: float, decay: float, dtype: torch.dtype, rtol: float
) -> None:
    model = network(dtype)
    train(model, lean(model, kind, momentum, decay).step)
    for one, two in zip(model.parameters(), reference(kind, momentum, decay, network(dtype)).parameters(), strict=True):
        assert torch.allclose(one, two, rtol=rtol, atol=rtol / 10)


class Odd(nn.Module):
    """Parameters that the fused kernels cannot take: their memory is in another order than that of their gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.across = nn.Parameter(torch.randn(3, 12).t())
        self.part = nn.Parameter(torch.randn(5, 8)[:, ::2])

    def give_gradients(self, index: int) -> None:
        generator = torch.Generator().manual_seed(index)
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("kind", "momentum"), KINDS)
def test_parameters_in_another_memory_order_equal_torchs_own_too(kind: str, momentum: float) -> None:
    ours, theirs = Odd(), Odd()
    optimizer = lean(ours, kind, momentum, 0.1)
    other: torch.optim.Optimizer
    if kind == "sgd":
        other = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum, weight_decay=0.1, foreach=False)
    else:
        other = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.1, foreach=False)
    for index in range(3):
        ours.give_gradients(index)
        theirs.give_gradients(index)
        optimizer.step(0.1)
        other.step()
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "momentum"), KINDS)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_an_update_takes_no_memory_of_a_parameters_size(
    kind: str, momentum: float, order: torch.memory_format, dtype: torch.dtype
) -> None:
    weight = nn.Parameter(torch.randn(64, 16, 8, 8).to(dtype, memory_format=order))
    optimizer = Optimizer(kind, {"weight": weight}, momentum=momentum, weight_decay=0.1)
    for _ in range(2):
        optimizer.allocate()
        weight.grad = torch.ones_like(weight)
        with LiveBytes() as live:
            optimizer.step(0.1)
        assert live.peak < 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "momentum"), KINDS)
def test_half_precision_is_updated_throughout(kind: str, momentum: float, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(100, dtype=dtype))
    optimizer = Optimizer(kind, {"weight": weight}, momentum=momentum)
    weight.grad = torch.ones_like(weight)
    optimizer.step(0.5)
    assert torch.allclose(weight, torch.full_like(weight, -0.5), atol=1e-2)


def test_complex_parameters_are_updated_as_torch_does() -> None:
    ours, theirs = (nn.Parameter(torch.full((2, 2), 1 + 1j)) for _ in range(2))
    ours.grad, theirs.grad = torch.full((2, 2), 2 - 1j), torch.full((2, 2), 2 - 1j)
    Optimizer("adamw", {"p": ours}, weight_decay=0.1).step(0.1)
    torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1, foreach=False).step()
    assert torch.allclose(ours, theirs)


def test_weight_decay_spares_norms_and_biases() -> None:
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    lean(model, "sgd", 0.0, 0.5).step(0.1)
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.ndim >= 2 else 1.0
        assert torch.allclose(parameter, before[name] * factor), name


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_gradients_are_dropped_and_parameters_without_one_rest(kind: str) -> None:
    model = network()
    optimizer = lean(model, kind, 0.9, 0.1)
    train(model, optimizer.step, 1)
    assert all(p.grad is None for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(1.0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_drop_gradients_leaves_nothing_to_step_on() -> None:
    model = network()
    optimizer = lean(model, "sgd", 0.9, 0.0)
    model(torch.randn(2, 2, 4, 4)).sum().backward()
    optimizer.drop_gradients()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_state_that_is_saved_and_loaded_goes_on_as_if_nothing_had_been(kind: str) -> None:
    straight, broken = network(), network()
    train(straight, (one := lean(straight, kind, 0.9, 0.1)).step)
    train(straight, one.step)
    train(broken, (two := lean(broken, kind, 0.9, 0.1)).step)
    state = {name: tensor.clone() for name, tensor in two.state.items()}
    fresh = lean(broken, kind, 0.9, 0.1)
    fresh.load(state)
    train(broken, fresh.step)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), broken.parameters(), strict=True))


@pytest.mark.parametrize(("kind", "momentum"), KINDS)
def test_stated_state_bytes_are_what_the_state_takes(kind: str, momentum: float) -> None:
    model = network()
    optimizer = lean(model, kind, momentum, 0.0)
    train(model, optimizer.step, 2)
    weights = sum(p.numel() * 4 for p in model.parameters())
    counters = 4 * len(list(model.parameters())) if kind == "adamw" else 0
    held = sum(t.untyped_storage().nbytes() for t in optimizer.state.values())
    assert held - counters == Optimizer.state_bytes(kind, weights, momentum)
