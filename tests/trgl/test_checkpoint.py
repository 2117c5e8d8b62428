"""Checkpointed pieces train exactly as the plain composition does."""

import copy
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ondevice_trgl.model.partition import partition
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.plan.live_bytes import LiveBytes
from ondevice_trgl.trgl.checkpoint import checkpointed


def dropping() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Dropout(0.3),
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3),
    )  # fmt: skip


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (lambda: build_model("resnet-small", num_classes=3, in_shape=(1, 8, 8)), (1, 8, 8)),
    "preact": (lambda: build_model("resnet-preact-3x4", num_classes=3, in_shape=(1, 8, 8)), (1, 8, 8)),
    "dropout": (dropping, (6,)),
}


def twins(name: str) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    make, shape = NETS[name]
    one, two = make(), make()
    two.load_state_dict(one.state_dict())
    return one, two, shape


@pytest.mark.parametrize("name", NETS)
def test_gradients_statistics_and_draws_are_those_of_the_plain_network(name: str) -> None:
    plain, pieces, shape = twins(name)
    modules = partition(pieces, torch.randn(2, *shape)).modules
    assert len(modules) > 1
    x = torch.randn(6, *shape)
    x_plain, x_pieces = x.clone().requires_grad_(), x.clone().requires_grad_()
    results = []
    for model, forward, leaf in ((plain, plain, x_plain), (pieces, checkpointed(modules), x_pieces)):
        torch.manual_seed(4)
        for _ in range(2):  # the second pass sees what the first did to the statistics
            loss = forward(leaf).square().sum()
            loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        results.append((loss.item(), torch.rand(1).item()))
    assert results[0] == results[1]
    assert x_plain.grad is not None
    assert x_pieces.grad is not None
    assert torch.allclose(x_plain.grad, x_pieces.grad, atol=1e-6)
    for (key, one), two in zip(plain.named_parameters(), pieces.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-5, atol=1e-6), key  # type: ignore[arg-type]
    for (key, buffer), twin in zip(plain.named_buffers(), pieces.buffers(), strict=True):
        assert torch.equal(buffer, twin), key


class Moody(nn.Module):
    """Its own buffer goes into what it computes, and moves; it draws from Python's random numbers."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(x.detach().mean(0))
        return self.linear(x - self.mean).tanh() * (2.0 if random.random() < 0.5 else 1.0)  # type: ignore[no-any-return]


def test_buffers_that_forward_changes_move_once_and_python_draws_the_same() -> None:
    torch.manual_seed(0)
    random.seed(3)
    pieces = [Moody(), Moody(), Moody()]
    twins = copy.deepcopy(pieces)
    x = torch.randn(6, 4)
    for _ in range(3):  # from the second pass on, what moves is known
        state = random.getstate()
        nn.Sequential(*twins)(x).square().sum().backward()
        after = random.getstate()
        random.setstate(state)
        checkpointed(pieces)(x).square().sum().backward()
        assert random.getstate() == after
    for piece, twin in zip(pieces, twins, strict=True):
        assert torch.equal(piece.mean, twin.mean)
        assert torch.equal(piece.linear.weight.grad, twin.linear.weight.grad)  # type: ignore[arg-type]


def test_statistics_are_put_back_where_backward_fails() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 2:
                raise ValueError("second pass")
            return self.norm(x)  # type: ignore[no-any-return]

    piece = Breaks()
    out = checkpointed([piece])(torch.randn(4, 3))
    with pytest.raises(ValueError, match="second pass"):
        out.sum().backward()
    assert {name for name, _ in piece.named_buffers()} == {
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    }  # fmt: skip


def test_only_the_inputs_of_the_pieces_are_kept() -> None:
    pieces = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()) for _ in range(3)]
    x = torch.randn(64, 8)
    with LiveBytes() as live:
        out = checkpointed(pieces)(x)
        kept = live.current
    assert kept <= 3 * 64 * 8 * 4 + 16_384  # three outputs, of which two are inputs; and the generator's states
    del out


def test_a_piece_that_changes_its_input_is_refused_not_wrong() -> None:
    class Centre(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sub_(1.0).relu()

    with pytest.raises(RuntimeError, match="Centre changes its input in place"):
        checkpointed([Centre(), nn.Linear(4, 2)])(torch.randn(3, 4))


def test_frozen_parameters_get_no_gradient() -> None:
    pieces = [nn.Linear(4, 4), nn.Linear(4, 2)]
    pieces[0].weight.requires_grad_(False)
    checkpointed(pieces)(torch.randn(3, 4)).sum().backward()
    assert pieces[0].weight.grad is None
    assert pieces[0].bias.grad is not None
