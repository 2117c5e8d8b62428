"""Where a network may be cut, what is refused, and what a trace must not change."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ondevice_trgl.errors import PartitionError
from ondevice_trgl.model.partition import partition
from ondevice_trgl.model.trace import Chain, trace


class Four(nn.Module):
    """Four linear layers to write forward passes with."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.d = nn.Linear(4, classes)
        self.relu = nn.ReLU(inplace=True)


def composed(model: nn.Module, x: Tensor) -> Tensor:
    parts = partition(model, torch.randn(2, *x.shape[1:]))
    for module in parts.modules:
        module.train(model.training)
        x = module(x)
    return x


def cut_names(chain: Chain) -> list[str]:
    return [segment.output.name for segment in chain.segments[:-1]]


def test_plain_chain_is_cut_before_every_weighted_layer_but_the_classifier() -> None:
    class Plain(Four):
        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.relu(self.c(self.relu(self.b(self.relu(self.a(x)))))))  # type: ignore[no-any-return]

    assert cut_names(trace(Plain(), torch.randn(2, 4))) == ["relu", "relu_1"]


def test_a_skip_across_a_candidate_cut_is_no_cut() -> None:
    class Skip(Four):
        def forward(self, x: Tensor) -> Tensor:
            early = self.a(x)
            out: Tensor = self.d(self.c(self.b(early)) + early)
            return out

    assert cut_names(trace(Skip(), torch.randn(2, 4))) == ["a"]


def test_a_batch_size_that_is_read_early_and_used_late_blocks_no_cut() -> None:
    class Sized(Four):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.shape[0]
            out: Tensor = self.d(self.c(self.b(self.a(x))).reshape(2 * rows, -1)[: rows + rows].view(rows, -1))
            return out

    model = Sized()
    assert cut_names(trace(model, torch.randn(2, 4))) == ["a", "b"]
    x = torch.randn(5, 4)
    assert torch.equal(composed(model, x), model(x))


def test_tied_weights_stay_in_one_module() -> None:
    class Tied(Four):
        def __init__(self) -> None:
            super().__init__()
            self.c.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(self.b(self.a(x))))  # type: ignore[no-any-return]

    class TiedByFunction(Four):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.d(functional.linear(self.b(self.a(x)), self.a.weight.t()))
            return out

    class Twice(Four):
        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.a(self.b(self.a(x))))  # type: ignore[no-any-return]

    for model in (Tied(), TiedByFunction(), Twice()):
        owners: dict[int, set[int]] = {}
        parts = partition(model, torch.randn(2, 4))
        for index, module in enumerate(parts.modules):
            for parameter in module.parameters():
                owners.setdefault(id(parameter), set()).add(index)
        assert all(len(modules) == 1 for modules in owners.values()), type(model).__name__


def test_only_tensors_whose_rows_are_samples_are_cut() -> None:
    class SequenceFirst(nn.Module):
        """(B, T, C), worked on as (T, B, C)."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x).transpose(0, 1))
            return self.d(self.c(x).mean(0))  # type: ignore[no-any-return]

    shapes = [segment.out_shape for segment in trace(SequenceFirst(), torch.randn(2, 5, 4)).segments]
    assert shapes == [(5, 4), (4,)]


@pytest.mark.parametrize("training", [True, False])
def test_functional_dropout_follows_the_mode_whatever_the_mode_while_tracing(training: bool) -> None:
    class Dropped(Four):
        def forward(self, x: Tensor) -> Tensor:
            x = functional.dropout(self.a(x), 0.5, training=self.training)
            return self.d(self.c(functional.dropout(self.b(x), 0.5, self.training)))  # type: ignore[no-any-return]

    model = Dropped().train(training)
    parts = partition(model, torch.randn(2, 4))
    x = torch.randn(16, 4)
    for mode in (True, False):
        model.train(mode)
        out = x
        torch.manual_seed(3)
        for module in parts.modules:
            out = module.train(mode)(out)
        torch.manual_seed(3)
        assert torch.equal(out, model(x))
    assert not torch.equal(model.train()(x), model.eval()(x))


def test_a_network_that_is_another_in_train_mode_is_refused() -> None:
    class Aux(Four):
        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            if self.training:
                x = self.c(x)
            return self.d(x)  # type: ignore[no-any-return]

    with pytest.raises(PartitionError, match="something else in train mode"):
        trace(Aux(), torch.randn(2, 4))


def test_a_parameter_that_is_read_directly_is_the_same_in_both_modes_whatever_it_holds() -> None:
    class Shifted(Four):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.full((4,), float("nan")))

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(self.b(self.a(x)) + self.shift))  # type: ignore[no-any-return]

    assert trace(Shifted(), torch.randn(2, 4)).num_outputs == 4


def test_a_constant_made_in_forward_is_no_difference_between_the_modes() -> None:
    class Constant(Four):
        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(self.b(self.a(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]))))  # type: ignore[no-any-return]

    model, x = Constant().eval(), torch.randn(3, 4)
    assert torch.equal(composed(model, x), model(x))


def test_results_dropped_after_an_operation_in_place_keep_their_effect() -> None:
    class InPlace(Four):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            functional.relu(x, inplace=True)
            x = self.b(x)
            functional.relu(x, True)
            x = self.c(x)
            x.clamp_(-0.1, 0.1)
            x.add_(1.0)
            return self.d(x)  # type: ignore[no-any-return]

    model, x = InPlace().eval(), torch.randn(16, 4)
    assert torch.equal(composed(model, x), model(x))


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        (lambda x: x.shape[0] > 2, "for another number of samples"),
        (lambda x: x.sum() > 0, "tests values that depend on the data"),
        (lambda x: float(x.sum()) > 0, "reads values that depend on the data"),
    ],
)
def test_an_if_on_the_samples_is_refused_with_its_file_and_line(test: Callable[[Tensor], bool], reason: str) -> None:
    class Branching(Four):
        def forward(self, x: Tensor) -> Tensor:
            if test(x):
                x = self.a(x)
            return self.d(x)  # type: ignore[no-any-return]

    with pytest.raises(PartitionError, match=rf"cannot be traced: .*{Path(__file__).name}:\d+: .*{reason}") as caught:
        trace(Branching(), torch.randn(2, 4))
    assert "kept whole" in caught.value.hint


def test_tests_and_asserts_on_the_shape_of_a_sample_are_what_they_are() -> None:
    class Shaped(Four):
        def forward(self, x: Tensor) -> Tensor:
            assert x.ndim == len(x.shape) == 2
            assert isinstance(x, Tensor)
            side = int(math.sqrt(x.shape[1]))
            if side == 2:
                x = self.b(self.a(x)).view(-1, side, side).flatten(1)
            return self.d(self.c(x))  # type: ignore[no-any-return]

    model, x = Shaped(), torch.randn(5, 4)
    assert len(trace(model, torch.randn(2, 4)).segments) == 3
    assert torch.equal(composed(model, x), model(x))


def test_an_if_inside_a_leaf_module_is_fine() -> None:
    class Leaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight if x.shape[0] > 1 else x

    model = nn.Sequential(nn.Linear(4, 4), Leaf(), Leaf(), nn.Linear(4, 3)).eval()
    for rows in (1, 3):
        x = torch.randn(rows, 4)
        assert torch.equal(composed(model, x), model(x))


def test_two_inputs_are_refused_by_name() -> None:
    class Two(Four):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.d(self.a(x) + self.b(y))  # type: ignore[no-any-return]

    with pytest.raises(PartitionError, match=r"takes 2 inputs \(x, y\), expected one"):
        trace(Two(), torch.randn(2, 4))


def test_an_optional_input_that_is_not_looked_at_is_left_out() -> None:
    class Optional(Four):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.d(self.c(self.b(self.a(x))))  # type: ignore[no-any-return]

    parts = partition(Optional(), torch.randn(2, 4))
    for module in parts.modules:
        (into,) = (node for node in module.graph.nodes if node.op == "placeholder")
    assert [into.target for into, _ in parts.modules[0].stretches] == ["x"]
    del into


@pytest.mark.parametrize("kind", ["tuple", "dict", "row"])
def test_outputs_other_than_rows_of_logits_are_refused(kind: str) -> None:
    class Odd(Four):
        def forward(self, x: Tensor) -> object:
            x = self.a(x)
            x = self.d(x)
            return {"tuple": (x, x), "dict": {"features": x, "mask": x}, "row": x.sum(1)}[kind]

    with pytest.raises(PartitionError, match="expected one tensor" if kind != "row" else "expected \\(batch, classes"):
        trace(Odd(), torch.randn(2, 4))


def test_an_input_that_does_not_fit_names_its_shape() -> None:
    with pytest.raises(PartitionError, match=r"does not accept an input of shape \(2, 5\)"):
        trace(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(2, 5))


def test_whole_numbers_are_never_a_boundary() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(self.embed(x.clamp(min=1)))).mean(1))  # type: ignore[no-any-return]

    chain = trace(Tokens(), torch.randint(0, 10, (2, 6)))
    assert chain.in_dtype == torch.int64
    assert [segment.out_shape for segment in chain.segments] == [(6, 4), (6, 4), (4,)]


def test_tracing_does_not_write_to_the_input() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Linear(4, 3))
    x = torch.randn(2, 4)
    before = x.clone()
    trace(model, x)
    assert torch.equal(x, before)
