"""How many samples a norm needs at a time: what torch itself refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ondevice_trgl.model.heads import build_head
from ondevice_trgl.model.norms import norms_of, norms_of_head
from ondevice_trgl.model.trace import trace


class Frozen(nn.BatchNorm2d):
    """Stays in eval mode, whatever it is told."""

    def train(self, mode: bool = True) -> "Frozen":
        super().train(False)
        return self


class Inside(nn.Module):
    """Around `layer`, on (B, 8, side, side)."""

    def __init__(self, layer: nn.Module | None, side: int = 1, *, flat: bool = False) -> None:
        super().__init__()
        self.conv, self.pool, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(side), layer
        self.flat = nn.Flatten() if flat else nn.Identity()
        self.scale = nn.Parameter(torch.ones(8))
        self.classifier = nn.Linear(8 if flat else 8 * side * side, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flat(self.pool(self.conv(x)))
        x = self.called(x) if self.norm is None else self.norm(x)
        out: Tensor = self.classifier(x.flatten(1))
        return out

    def called(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, None, None, self.scale, training=True)


def trains_on(model: nn.Module, samples: int) -> bool:
    try:
        model.train()(torch.randn(samples, 3, 8, 8))
    except ValueError:
        return False
    return True


LAYERS: list[tuple[str, Callable[[], nn.Module], bool]] = [
    ("batch at 1x1", lambda: Inside(nn.BatchNorm2d(8)), True),
    ("batch at 2x2", lambda: Inside(nn.BatchNorm2d(8), 2), True),
    ("batch of vectors", lambda: Inside(nn.BatchNorm1d(8), flat=True), True),
    ("in sync", lambda: Inside(nn.SyncBatchNorm(8)), True),
    ("frozen", lambda: Inside(Frozen(8)), False),
    ("called", lambda: Inside(None), True),
    ("called at 2x2", lambda: Inside(None, 2), True),
    ("each channel a group", lambda: Inside(nn.GroupNorm(8, 8)), False),
    ("two channels a group", lambda: Inside(nn.GroupNorm(4, 8)), False),
    ("instance at 2x2", lambda: Inside(nn.InstanceNorm2d(8), 2), False),
    ("layer", lambda: Inside(nn.LayerNorm((8, 1, 1))), False),
]


@pytest.mark.parametrize(("make", "mixes"), [row[1:] for row in LAYERS], ids=[row[0] for row in LAYERS])
def test_what_is_said_is_what_torch_does(make: Callable[[], nn.Module], mixes: bool) -> None:
    model = make()
    found = [norm for norms in norms_of(trace(model, torch.randn(3, 3, 8, 8))) for norm in norms]
    leasts: list[Any] = [norm.least for norm in found]
    for samples in (1, 2):
        assert trains_on(model, samples) == all(least is not None and least <= samples for least in leasts), samples
    assert any(norm.mixes for norm in found) == mixes


def test_it_names_layer_kind_and_size() -> None:
    (norm,) = (norm for norms in norms_of(trace(Inside(nn.BatchNorm2d(8)), torch.randn(2, 3, 8, 8))) for norm in norms)
    assert str(norm) == "norm (BatchNorm2d at 1x1)"


def test_looking_at_a_head_imports_next_to_nothing(run_python: Callable[..., str]) -> None:
    """What it imports stays in the process that plans, which may be the one that trains."""
    source = "; ".join(
        (
            "import sys",
            "from ondevice_trgl.model.norms import norms_of_head",
            "assert norms_of_head('mlp-sr', (512, 8, 8), 3)",
            "print('sympy' in sys.modules, 'torch._dynamo' in sys.modules)",
        )
    )
    assert run_python(source).split() == ["False", "False"]


@pytest.mark.parametrize("name", ["pooled-linear", "conv", "mlp", "mlp-sr"])
@pytest.mark.parametrize("side", [1, 3, 8, 16])
def test_heads_say_what_they_do(name: str, side: int) -> None:
    found = norms_of_head(name, (4, side, side), 3)
    head = build_head(name, (4, side, side), 3).train()
    try:
        head(torch.randn(1, 4, side, side))
        refuses = False
    except ValueError:
        refuses = True
    assert any(norm.least == 2 for norm in found) == refuses
    assert all(norm.mixes for norm in found)
    assert bool(found) == (name in ("conv", "mlp-sr"))
