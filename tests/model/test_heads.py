"""Auxiliary heads give one row of logits for every layout, at any batch."""

import pytest
import torch

from ondevice_trgl.config import HEADS
from ondevice_trgl.errors import PartitionError, UnknownNameError
from ondevice_trgl.model.heads import build_head


@pytest.mark.parametrize("shape", [(8, 5, 7), (3, 1, 1), (4, 16, 16), (600, 2, 2), (9,), (6, 12), (2, 3, 4, 5)])
@pytest.mark.parametrize("name", ["pooled-linear", "mlp"])
def test_pooled_heads_take_every_layout(name: str, shape: tuple[int, ...]) -> None:
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
