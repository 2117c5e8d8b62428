"""Auxiliary heads give one row of logits for every layout, at any batch."""

import pytest
import torch

from ondevice_trgl.config import HEADS
from ondevice_trgl.errors import PartitionError, UnknownNameError
from ondevice_trgl.model.heads import SMALL, build_head, head_behind
from ondevice_trgl.model.partition import group
from ondevice_trgl.model.store import parameter_count
from ondevice_trgl.model.trace import trace
from ondevice_trgl.model.zoo import build_model


@pytest.mark.parametrize(
    "shape", [(8, 5, 7), (3, 1, 1), (4, 16, 16), (600, 2, 2), (9,), (6, 12), (2, 3, 4, 5), (2, 3, 2, 2, 3)]
)
@pytest.mark.parametrize("name", ["pooled-linear", "mlp", "3lin"])
def test_heads_of_linear_layers_take_every_layout(name: str, shape: tuple[int, ...]) -> None:
    head = build_head(name, shape, 7)
    assert head(torch.randn(4, *shape)).shape == (4, 7)
    assert head.eval()(torch.randn(1, *shape)).shape == (1, 7)


@pytest.mark.parametrize("shape", [(8, 5, 7), (3, 1, 1), (4, 16, 16)])
@pytest.mark.parametrize("name", ["conv", "mlp-sr"])
def test_convolutional_heads_take_images(name: str, shape: tuple[int, ...]) -> None:
    assert build_head(name, shape, 7)(torch.randn(4, *shape)).shape == (4, 7)


@pytest.mark.parametrize("name", ["conv", "mlp-sr"])
def test_convolutional_heads_refuse_vectors_with_a_way_out(name: str) -> None:
    with pytest.raises(
        PartitionError, match=rf"'{name}' needs an activation \(C, H, W\), this one is \(9,\)"
    ) as caught:
        build_head(name, (9,), 7)
    assert "mlp" in caught.value.hint


def test_tokens_are_averaged_over_their_sequence_not_their_channels() -> None:
    head = build_head("pooled-linear", (5, 4), 3)  # (T, C)
    x = torch.randn(2, 5, 4)
    assert torch.allclose(head(x), head(x[:, torch.randperm(5)]), atol=1e-6)
    assert [p.shape for p in head.parameters()] == [(3, 4), (3,)]


@pytest.mark.parametrize("name", HEADS)
def test_every_configured_head_exists_and_reaches_its_input(name: str) -> None:
    head = build_head(name, (6, 8, 8), 4)
    x = torch.randn(4, 6, 8, 8, requires_grad=True)
    head(x)[:, 1].sum().backward()
    assert x.grad is not None
    assert int((x.grad != 0).sum()) > 0


def test_unknown_head_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean mlp"):
        build_head("mpl", (4,), 3)


@pytest.mark.parametrize("classes", [10, 200])
@pytest.mark.parametrize("shape", [(16, 8, 8), (64, 8, 8), (256, 6, 6), (512, 2, 2), (1, 3, 3)])
@pytest.mark.parametrize("name", ["conv", "mlp", "mlp-sr"])
@pytest.mark.parametrize("limit", [100_000, SMALL, 300_000, 10**9])
def test_a_head_is_narrowed_to_its_limit_and_no_further(
    limit: int, name: str, shape: tuple[int, ...], classes: int
) -> None:
    head, widest = build_head(name, shape, classes, limit=limit), build_head(name, shape, classes)
    if parameter_count(widest) <= limit:
        assert [p.shape for p in head.parameters()] == [p.shape for p in widest.parameters()]
    elif name != "conv" or limit > 100_000:  # a kernel has 9 · C · 32 weights at the least
        assert parameter_count(head) <= limit
    assert head.state_dict().keys() == widest.state_dict().keys()
    assert parameter_count(head) <= parameter_count(widest)
    assert head(torch.randn(4, *shape)).shape == (4, classes)


def test_narrowing_draws_no_random_numbers_and_makes_no_tensor_that_it_drops() -> None:
    torch.manual_seed(0)
    narrow = build_head("mlp", (64, 8, 8), 10, limit=100_000)
    torch.manual_seed(0)
    again = build_head("mlp", (64, 8, 8), 10, limit=100_000)
    assert parameter_count(narrow) < parameter_count(build_head("mlp", (64, 8, 8), 10))
    assert all(torch.equal(a, b) for a, b in zip(narrow.parameters(), again.parameters(), strict=True))
    torch.manual_seed(0)
    first = torch.nn.Linear(1024, 64).weight  # the first layer of the narrow head, and no draw before it
    assert torch.equal(next(narrow.parameters()), first)


def test_heads_of_residual_networks_and_transformers_are_as_wide_as_they_can_be() -> None:
    for name, expected in {
        "resnet18": [149_002] * 3 + [199_690] * 2 + [330_762] * 2 + [199_690],
        "vit_b_16": [265_226] * 24,
    }.items():
        chain = trace(build_model(name, num_classes=10, in_shape=(3, 32, 32)), torch.zeros(2, 3, 32, 32))
        parts = group(chain, range(len(chain.segments) + 1))
        heads = [head_behind(module, "mlp", 10) for module in parts.modules[:-1]]
        assert [parameter_count(head) for head in heads] == expected
        assert all(
            parameter_count(head) <= max(SMALL, parameter_count(module))
            for head, module in zip(heads, parts.modules, strict=False)
        )


def test_names_in_the_state_of_a_head_on_images_are_those_of_its_layers() -> None:
    assert list(build_head("mlp", (6, 8, 8), 4).state_dict()) == [
        f"{layer}.{what}" for layer in (2, 4, 6) for what in ("weight", "bias")
    ]


def test_three_linear_layers_see_all_that_there_is() -> None:
    head = build_head("3lin", (16, 7, 7), 10)
    assert [p.shape for p in head.parameters() if p.ndim == 2] == [(392, 784), (196, 392), (10, 196)]
    assert parameter_count(build_head("3lin", (16, 7, 7), 10, limit=SMALL)) <= SMALL
