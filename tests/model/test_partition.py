"""Local modules: their composition is the network, with its parameters, names and gradients."""

from collections.abc import Callable
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ondevice_trgl.errors import PartitionError
from ondevice_trgl.model.bounds import balance
from ondevice_trgl.model.partition import Partition, partition
from ondevice_trgl.model.store import state_of
from ondevice_trgl.model.zoo import build_model

IMAGE = (1, 12, 12)


class FunctionalNet(nn.Module):
    """Functional ops, views that read the shape, nested Sequentials."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True))),
            nn.Sequential(nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)), nn.ReLU()),
        )
        self.kernel = nn.Parameter(torch.randn(6, 6, 3, 3) * 0.1)
        self.fc = nn.Linear(6 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        x = nn.functional.conv2d(x, self.kernel, padding=1)
        x = nn.functional.max_pool2d(nn.functional.relu(x), 2)
        out: Tensor = self.fc(x.view(x.shape[0], -1))
        return out


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))


def compose(parts: Partition, x: Tensor) -> Tensor:
    for module in parts.modules:
        x = module(x)
    return x


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "functional":
        return FunctionalNet()
    return build_model(name, num_classes=5, in_shape=IMAGE)


@pytest.mark.parametrize("count", ["auto", 1, 2, 3])
@pytest.mark.parametrize("name", ["resnet-small", "resnet-preact-4x6", "functional"])
def test_composition_is_the_network_bitwise_in_eval_mode(name: str, count: str | int) -> None:
    model = network(name)
    for _ in range(2):  # running statistics that are not the initial ones
        model(torch.randn(4, *IMAGE))
    parts = partition(model, torch.randn(2, *IMAGE), count)
    model.eval()
    for module in parts.modules:
        module.eval()
    x = torch.randn(3, *IMAGE)
    assert torch.equal(compose(parts, x), model(x))


@pytest.mark.parametrize("name", ["resnet-small", "resnet-preact-4x6", "functional"])
def test_composition_has_the_gradients_and_statistics_of_the_network(name: str) -> None:
    model, twin = network(name), network(name)
    twin.load_state_dict(model.state_dict())
    parts = partition(twin, torch.randn(2, *IMAGE))
    assert len(parts.modules) > 1
    x = torch.randn(4, *IMAGE)
    model(x).square().sum().backward()
    compose(parts, x).square().sum().backward()
    expected = dict(model.named_parameters())
    for key, parameter in twin.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected[key].grad), key  # type: ignore[arg-type]
    for key, tensor in twin.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key


def test_modules_share_the_parameters_under_their_own_names_each_in_one_module() -> None:
    model = network("resnet-small")
    own = model.state_dict(keep_vars=True)
    seen: dict[str, Tensor] = {}
    for module in partition(model, torch.randn(2, *IMAGE)).modules:
        for key, tensor in state_of(module).items():
            assert key not in seen
            assert tensor is own[key]
            seen[key] = tensor
    assert seen.keys() == own.keys()


def test_partition_leaves_the_network_as_it_was() -> None:
    model = network("resnet-small")
    model.train()
    model.get_submodule("stem").eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    modes = {key: module.training for key, module in model.named_modules()}
    partition(model, torch.randn(2, *IMAGE))
    assert {key: module.training for key, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_auto_makes_one_module_a_residual_block() -> None:
    parts = partition(network("resnet-small"), torch.randn(2, *IMAGE))
    assert [module.label for module in parts.modules][1:-1] == [f"blocks.{i}" for i in range(5)]
    assert parts.modules[-1].label == "blocks.5..classifier"
    assert parts.modules[0].out_shape == (16, 12, 12)
    assert parts.modules[-1].out_shape == (5,)
    assert all(a.out_shape == b.in_shape for a, b in pairwise(parts.modules))


def test_any_batch_size_passes_after_tracing_at_another() -> None:
    parts = partition(network("functional"), torch.randn(2, *IMAGE))
    assert compose(parts, torch.randn(7, *IMAGE)).shape == (7, 5)


def test_named_boundaries_end_the_modules_there() -> None:
    parts = partition(network("resnet-small"), torch.randn(2, *IMAGE), ["blocks.1", "blocks.3"])
    assert len(parts.modules) == 3
    assert [m.in_shape for m in parts.modules] == [IMAGE, (16, 12, 12), (32, 6, 6)]
    assert "blocks.1.bn2.weight" in state_of(parts.modules[0])
    assert "blocks.2.bn2.weight" in state_of(parts.modules[1])


@pytest.mark.parametrize(
    ("frozen", "expected"), [((), [False] * 3), (("0",), [True, False, False]), (("0", "2", "4"), [True] * 3)]
)
def test_a_module_is_frozen_where_nothing_in_it_has_a_gradient(frozen: tuple[str, ...], expected: list[bool]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    model[5].requires_grad_("4" not in frozen)
    assert [module.frozen for module in partition(model, torch.randn(2, 4)).modules] == expected


def test_what_runs_without_gradients_is_frozen() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.b(self.a(x).relu()).relu()
            return self.d(self.c(x))  # type: ignore[no-any-return]

    class Late(Body):
        def forward(self, x: Tensor) -> Tensor:  # a has no gradient either, though nothing in it says so
            return self.d(self.c(self.b(self.a(x).relu()).detach().relu()))  # type: ignore[no-any-return]

    for kind in (Body, Late):
        modules = partition(kind(), torch.randn(2, 4)).modules
        assert [module.frozen for module in modules] == [True, True, False]


def test_a_network_that_cannot_be_cut_says_what_crosses() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            one = self.a(x)
            two = self.b(x)
            return self.c(one + two) + x  # type: ignore[no-any-return]

    with pytest.raises(
        PartitionError, match=r"cut nowhere; .*behind a 2, which are .*test_partition\.py:\d+"
    ) as caught:
        partition(Dense(), torch.randn(2, 4), 2)
    assert "modules=" in caught.value.hint
    assert "--modules" in caught.value.hint


def test_unknown_boundary_suggests_the_nearest_and_lists_all() -> None:
    with pytest.raises(PartitionError, match=r"'block\.1'; did you mean .*blocks\.1") as caught:
        partition(network("resnet-small"), torch.randn(2, *IMAGE), ["block.1"])
    assert "blocks.4" in caught.value.hint


@pytest.mark.parametrize("names", [["blocks.3", "blocks.1"], ["blocks.1", "blocks.1"]])
def test_boundaries_out_of_order_or_twice_are_refused(names: list[str]) -> None:
    with pytest.raises(PartitionError, match="not behind the one before"):
        partition(network("resnet-small"), torch.randn(2, *IMAGE), names)


def test_a_layer_inside_a_residual_block_is_no_boundary() -> None:
    with pytest.raises(PartitionError, match=r"no boundary at 'blocks\.1\.bn1'"):
        partition(network("resnet-small"), torch.randn(2, *IMAGE), ["blocks.1.bn1"])


@pytest.mark.parametrize("count", [0, -1, 4, 1000])
def test_too_many_or_too_few_modules_name_the_range(count: int) -> None:
    with pytest.raises(PartitionError, match="can be cut into 1 to 3 modules"):
        partition(Mlp(), torch.randn(2, 4), count)


def test_a_network_without_a_cut_point_is_one_module() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.c = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            out: Tensor = self.c(torch.cat([x, a, self.b(a)], 1))
            return out

    assert len(partition(Dense(), torch.randn(2, 4)).modules) == 1
    with pytest.raises(PartitionError, match="modules = 2"):
        partition(Dense(), torch.randn(2, 4), 2)


def test_other_words_than_auto_are_refused() -> None:
    with pytest.raises(PartitionError, match="modules = 'many'"):
        partition(Mlp(), torch.randn(2, 4), "many")


def test_record_of_a_partition_counts_every_parameter_once() -> None:
    model = network("resnet-small")
    record = partition(model, torch.randn(2, *IMAGE), 3).to_dict()
    assert sum(module["params"] for module in record["modules"]) == sum(p.numel() for p in model.parameters())
    assert record["bounds"][0] == 0
    assert [len(module["branches"]) for module in record["modules"]].count(0) == 0


@given(st.lists(st.integers(0, 30), min_size=1, max_size=7))
def test_balance_finds_the_least_worst_group_for_every_count(loads: list[int]) -> None:
    length = len(loads)
    groupings = balance(length, length, lambda a, b: sum(loads[a:b]))

    def worst(bounds: tuple[int, ...]) -> int:
        return max(sum(loads[a:b]) for a, b in pairwise(bounds))

    assert [len(bounds) - 1 for bounds in groupings] == list(range(1, length + 1))
    for count, bounds in enumerate(groupings, start=1):
        every = [(0, *inner, length) for inner in combinations(range(1, length), count - 1)]
        assert bounds in every
        assert worst(bounds) == min(worst(other) for other in every)


def test_an_error_inside_a_module_is_not_printed_and_imports_nothing(run_python: Callable[..., str]) -> None:
    """torch.fx would import torch._dynamo to print it: 73 MB, when memory has just been refused."""
    out = run_python(
        "import contextlib, io, sys\nimport torch\nfrom torch import nn\n"
        "from ondevice_trgl.model.partition import partition\n"
        "from ondevice_trgl.trgl.transport import with_transport\n"
        "class Block(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.a = nn.Linear(4, 4)\n"
        "    def forward(self, x):\n        return x + self.a(x)\n"
        "module = partition(nn.Sequential(Block(), Block(), nn.Linear(4, 3)), torch.randn(2, 4), 2).modules[0]\n"
        "for graph in (module, with_transport(module, 'displacement', 'mean')):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as printed:\n"
        "        try:\n            graph(torch.randn(2, 5))\n"
        "        except RuntimeError as error:\n            assert 'shapes cannot be multiplied' in str(error)\n"
        "    print(repr(printed.getvalue()), 'torch._dynamo' in sys.modules)\n"
    )
    assert out.splitlines() == ["'' False"] * 2
