"""The transport cost: value and gradient against a plain float64 computation, and the memory that it does not take."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ondevice_trgl.model.heads import head_behind
from ondevice_trgl.model.partition import LocalModule, partition
from ondevice_trgl.model.resnets import BasicBlock, PreactBlock
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.plan.live_bytes import LiveBytes
from ondevice_trgl.trgl.moved import moved, start
from ondevice_trgl.trgl.step import Objective
from ondevice_trgl.trgl.transport import has_transport, with_transport

SHAPE = (4, 6, 6)


class Net(nn.Module):
    """Blocks on (B, 4, 6, 6), then a layer that keeps the last block apart from the classifier."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.tail = nn.Conv2d(4, 2, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.tail(self.blocks(x))).flatten(1))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A branch without BatchNorm; `combine` makes the block's output from x and r."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor], identity: bool = False) -> None:
        super().__init__()
        self.combine = combine
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.same = nn.Identity()
        self.identity = identity

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(torch.relu(self.conv(x)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        out = self.combine(x, self.branch(x))
        return self.same(out) if self.identity else out


class ThenRelu(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(super().forward(x))  # type: ignore[no-any-return]


def plus(x: Tensor, r: Tensor) -> Tensor:
    return x + r


def plus_in_place(x: Tensor, r: Tensor) -> Tensor:
    r += x
    return r


def add_method_in_place(x: Tensor, r: Tensor) -> Tensor:
    return r.add_(x)


def add_without_rebinding(x: Tensor, r: Tensor) -> Tensor:
    r.add_(x)
    return r


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "add": lambda: Block(plus),
    "add, then ReLU in place": lambda: ThenRelu(plus),
    "add in place": lambda: Block(plus_in_place),
    "add in place, then ReLU in place": lambda: ThenRelu(plus_in_place),
    "add_, then ReLU in place": lambda: ThenRelu(add_method_in_place),
    "add_ without rebinding": lambda: Block(add_without_rebinding),
    "add, Identity, then ReLU in place": lambda: ThenRelu(plus, identity=True),
    "preact": lambda: PreactBlock(4, 4, 1),
    "BatchNorm-ended": lambda: BasicBlock(4, 4, 1),
}


def branch_of(block: nn.Module, x: Tensor) -> Tensor:
    """r of a block, written out."""
    if isinstance(block, BasicBlock):
        return block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))  # type: ignore[no-any-return]
    if isinstance(block, PreactBlock):
        return block.conv2(torch.relu(block.bn2(block.conv1(torch.relu(block.bn1(x))))))  # type: ignore[no-any-return]
    assert isinstance(block, Block)
    return block.branch(x)


def reference(net: Net, x: Tensor, kind: str, norm: str) -> tuple[Tensor, Tensor]:
    """(out, cost) in plain float64 autograd."""
    cost = torch.zeros((), dtype=torch.float64)
    for block in net.blocks:
        r = branch_of(block, x)
        relu = isinstance(block, ThenRelu | BasicBlock)
        out = torch.relu(x + r) if relu else x + r
        moved = r if kind == "branch" else out - x
        cost = cost + (moved.square().mean() if norm == "mean" else moved.square().sum() / len(x))
        x = out
    return net.fc(net.tail(x).mean((2, 3))), cost


def pair(make: Callable[[], nn.Module], count: int = 2) -> tuple[Net, Net]:
    torch.manual_seed(1)
    net = Net(*(make() for _ in range(count)))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    torch.manual_seed(1)
    twin = Net(*(make() for _ in range(count)))
    twin.load_state_dict(net.state_dict())
    return net, twin.double()


def whole(net: Net) -> LocalModule:
    (module,) = partition(net, torch.randn(2, *SHAPE), 1).modules
    return module


@pytest.mark.parametrize("norm", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["branch", "displacement"])
@pytest.mark.parametrize("block", BLOCKS)
def test_value_and_gradients_equal_a_plain_float64_computation(block: str, kind: str, norm: str) -> None:
    net, exact = pair(BLOCKS[block])
    if isinstance(net.blocks[0], BasicBlock):
        for module in [*net.modules(), *exact.modules()]:
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-9  # the closed form is exact up to var / (var + eps)
    x = torch.randn(5, *SHAPE)
    module = whole(net)
    out, cost = with_transport(module, kind, norm)(x)
    expected_out, expected = reference(exact, x.double(), kind, norm)
    assert torch.allclose(out.double(), expected_out, atol=1e-4, rtol=1e-4)
    assert cost.item() == pytest.approx(expected.item(), rel=1e-4)
    (0.7 * cost).backward()
    (0.7 * expected).backward()
    wanted = dict(exact.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in wanted.values() if p.grad is not None)
    for name, parameter in net.named_parameters():
        other = wanted[name].grad
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        want = torch.zeros_like(wanted[name]) if other is None else other
        assert torch.allclose(got.double(), want, rtol=1e-3, atol=1e-4 * largest), name


def test_closed_form_is_off_by_no_more_than_eps_allows() -> None:
    net, exact = pair(BLOCKS["BatchNorm-ended"], 1)
    x = torch.randn(5, *SHAPE)
    block = exact.blocks[0]
    assert isinstance(block, BasicBlock)
    before = block.conv2(torch.relu(block.bn1(block.conv1(x.double()))))
    variance = before.var((0, 2, 3), unbiased=False)
    _, cost = with_transport(whole(net), "branch", "mean")(x)
    shrunk = block.bn2.weight.square() * variance / (variance + block.bn2.eps) + block.bn2.bias.square()
    assert branch_of(block, x.double()).square().mean().item() == pytest.approx(shrunk.mean().item(), rel=1e-9)
    assert cost.item() == pytest.approx((block.bn2.weight.square() + block.bn2.bias.square()).mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["branch", "displacement"])
@pytest.mark.parametrize("block", BLOCKS)
def test_output_gradients_and_statistics_are_those_of_the_module(block: str, kind: str) -> None:
    net, _ = pair(BLOCKS[block], 3)
    other, _ = pair(BLOCKS[block], 3)
    x = torch.randn(5, *SHAPE)
    out, _ = with_transport(whole(net), kind, "mean")(x.clone())
    plain = other(x.clone())
    assert torch.allclose(out, plain, atol=1e-6)
    out.square().sum().backward()
    plain.square().sum().backward()
    for (name, one), two in zip(net.named_parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert torch.allclose(one.grad, two.grad, atol=1e-5, rtol=1e-5), name
    for buffer, twin in zip(net.buffers(), other.buffers(), strict=True):
        assert torch.allclose(buffer, twin)


def kept_bytes(run: Callable[[Tensor], object], x: Tensor) -> int:
    with LiveBytes() as live:
        result = run(x)
        kept: int = live.current
    del result
    return kept


@pytest.mark.parametrize("kind", ["branch", "displacement"])
@pytest.mark.parametrize("name", ["resnet20", "resnet-preact-6x8"])
def test_transport_raises_the_peak_of_a_step_by_less_than_a_hundredth(name: str, kind: str) -> None:
    model = build_model(name, num_classes=3, in_shape=(1, 24, 24))
    for module in partition(model, torch.randn(2, 1, 24, 24), 3).modules[:-1]:
        goals = [
            Objective(module, head_behind(module, "mlp", 3), tau=tau, transport=kind, transport_norm="mean",
                      label_smoothing=0.1)
            for tau in (None, 1.0)
        ]  # fmt: skip
        assert goals[1].measures_transport
        peaks = []
        for goal in goals:
            batch = torch.randn(16, *module.in_shape), torch.arange(16) % 3
            goal.backward(*batch, 1.0)  # gradients are there
            with LiveBytes() as live:
                goal.backward(*batch, 1.0)
            peaks.append(live.peak)
        assert peaks[1] <= 1.01 * peaks[0], module.label


def test_an_activation_that_is_changed_in_place_behind_the_cost_is_told_of() -> None:
    z = torch.randn(4, 3, requires_grad=True)
    before, link = start(z)
    out, cost, _ = moved(before * 2.0, before, link)
    result = out.sum() + cost
    with torch.no_grad():
        out.add_(1.0)
    with pytest.raises(RuntimeError, match=r"in.?place"):
        result.backward()


@pytest.mark.parametrize("name", ["resnet-small", "resnet-preact-6x8"])
def test_branch_transport_keeps_no_more_activations_alive(name: str) -> None:
    model = build_model(name, num_classes=3, in_shape=(1, 16, 16))
    *earlier, last = partition(model, torch.randn(2, 1, 16, 16), 3).modules
    for module in (*earlier, last):
        x = torch.randn(8, *module.in_shape)
        plain = kept_bytes(module, x)
        assert has_transport(module, "branch")
        more = kept_bytes(with_transport(module, "branch", "mean"), x) - plain
        # the average pool keeps nothing of the last block's output: there a branch that is measured costs one tensor
        pooled = 8 * 8 * 16 * 16 * 4 if module is last and "preact" in name else 0
        assert 0 <= more - pooled <= 4096, module.label  # scalars and, for BatchNorm, vectors of channels


def test_displacement_in_a_network_of_plain_layers_uses_what_keeps_the_shape() -> None:
    model = nn.Sequential(
        nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)
    )
    (module,) = partition(model, torch.randn(2, 6), 1).modules
    x = torch.randn(4, 6)
    for kind in ("branch", "displacement"):
        _, cost = with_transport(module, kind, "mean")(x)
        a = model[1](model[0](x))
        b = model[3](model[2](a))
        assert cost.item() == pytest.approx(((a - x).square().mean() + (b - a).square().mean()).item(), rel=1e-5)


def test_a_module_without_any_place_for_it_has_no_transport() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    (module,) = partition(model, torch.randn(2, 6), 1).modules
    assert not has_transport(module, "branch")
    assert not has_transport(module, "displacement")


class OverwritesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.relu(x)) + x  # type: ignore[no-any-return]


def test_displacement_is_measured_from_the_input_as_it_came() -> None:
    net = Net(nn.Conv2d(4, 4, 1), OverwritesItsInput(), nn.Conv2d(4, 4, 1))
    modules = partition(net, torch.randn(2, *SHAPE)).modules
    x = torch.randn(5, *SHAPE)
    costs, z = [], x
    for module in modules:
        into = z.clone()
        z, cost = with_transport(module, "displacement", "mean")(z)
        if cost is not None:
            costs.append((cost.item(), (z - into).square().mean().item()))
        z = z.detach()
    assert costs
    for got, want in costs:
        assert got == pytest.approx(want, rel=1e-5)
