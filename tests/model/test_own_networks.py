"""Networks as people write them, two or more of each kind: cut, they are what was written, or they are refused."""

import copy
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ondevice_trgl.errors import PartitionError
from ondevice_trgl.model.partition import partition
from ondevice_trgl.model.store import state_of

HERE = Path(__file__).name


def block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
    )


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.fc = block(3, 8), block(8, 16, 2), block(16, 16), nn.Linear(16, 10)

    def rest(self, x: Tensor) -> Tensor:
        return self.fc(self.c(self.b(x)).mean((2, 3)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Any:
        return self.rest(self.a(x))


class NoGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.b(self.a(x))
        return self.fc(self.c(x).mean((2, 3)))  # type: ignore[no-any-return]


class Detached(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.a(x).detach())


class SwitchedOff(Base):
    """Gradients are off in the middle alone, for a function."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        scale = x.mean((2, 3), keepdim=True).sigmoid()
        torch.set_grad_enabled(before)
        return self.rest(x * scale)


class FrozenLayer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.b.requires_grad_(False)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Scaled(torch.autograd.Function):
    """With a number, and a gradient that is not that of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class Signs(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.rest(Straight.apply(self.a(x)))  # type: ignore[no-untyped-call]


class Reversed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.rest(Scaled.apply(self.a(x), -0.5))  # type: ignore[no-untyped-call]


class SignLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Straight.apply(x)  # type: ignore[no-any-return,no-untyped-call]


class SignLayers(Base):
    def __init__(self) -> None:
        super().__init__()
        self.sign = SignLayer()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.sign(self.a(x)))


class FrozenNorms(Base):
    def train(self, mode: bool = True) -> "FrozenNorms":
        super().train(mode)
        for module in self.b.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class AlwaysDrops(Base):
    """Monte Carlo dropout: also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> "AlwaysDrops":
        super().train(mode)
        self.drop.train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.drop(self.a(x)))


def norm_in_eval_mode() -> nn.Module:
    model = Base()
    model.a[1].eval()
    return model


class Running(nn.Module):
    """Counts, and keeps a mean, while it trains; with a child, so that it is looked into."""

    mean: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.register_buffer("mean", torch.ones(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
        return self.inner(x - self.mean[:, None, None])  # type: ignore[no-any-return]


class Counting(Base):
    def __init__(self) -> None:
        super().__init__()
        self.running = Running()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.running(self.a(x)))


class Rebound(Base):
    """In either mode, and by assignment."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        return self.rest(x - self.mean[:, None, None])


class FreshConstant(Base):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.zeros(10)
        bias += self.p
        return super().forward(x) + bias  # type: ignore[no-any-return]


class Filled(Base):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.size(-1), x.size(-1))
        mask[: x.size(-1) // 2] = 0.5
        return super().forward(x * mask)  # type: ignore[no-any-return]


MEAN = torch.tensor([0.1, 0.2, 0.3])


class OfTheFile(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - MEAN.view(-1, 1, 1))  # type: ignore[no-any-return]


class Plain(Base):
    """A tensor that is no buffer, and a buffer that is in no state dict."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.full((8, 1, 1), 0.3)
        self.register_buffer("scale", torch.full((8, 1, 1), 1.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.a(x) * self.scale + self.shift)


class Growing(nn.Module):
    """A table that is a plain attribute, made anew where the input is of another size; values decide nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.zeros(1, 1)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape[-1] != x.shape[-1]:
            self.table = torch.arange(x.shape[-1], dtype=x.dtype).view(1, -1) / x.shape[-1]
        return x + self.weight * self.table


class Grown(Base):
    def __init__(self) -> None:
        super().__init__()
        self.grow = Growing()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.grow(self.a(x)))


class GrowingBuffer(Growing):
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        del self.table
        self.register_buffer("table", torch.zeros(1, 1), persistent=False)


class GrownBuffer(Grown):
    def __init__(self) -> None:
        super().__init__()
        self.grow = GrowingBuffer()


class Flag(Base):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        x = self.c(self.b(self.a(x))).mean((2, 3))
        return x if return_features else self.fc(x)


class Mask(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        x = self.a(x)
        if mask is not None:
            x = x * mask
        return self.rest(x) if not args and not kwargs.get("features") else x


class Shaped(Base):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 3, "three channels"
        if x.shape[-1] > 8:
            x = functional.avg_pool2d(x, 2)
        x = self.a(x)
        side = int(math.sqrt(x.flatten(2).size(2)))
        return self.rest(x.flatten(2).reshape(*x.shape[:2], side, -1))


class Sliced(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.rest(x[:, : x.size(1)] + x.new_zeros(len(x), *x.shape[1:]))


class DropPath(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.rest(functional.dropout(self.a(x), 0.1 if self.training else 0.0))


class Stochastic(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training:
            x = x * torch.rand(x.shape[0], 1, 1, 1)
        return self.rest(x)


class StochasticLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return self.inner(x * torch.bernoulli(torch.full((x.shape[0], 1, 1, 1), 0.7)))  # type: ignore[no-any-return]


class StochasticLayers(Base):
    def __init__(self) -> None:
        super().__init__()
        self.drop = StochasticLayer()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.drop(self.a(x)))


class OddNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.code, self.graph, self.branches = block(3, 8), block(8, 16, 2), nn.Linear(16, 10)
        self.label, self.net, self.kept = nn.Identity(), block(16, 16), nn.Identity()
        self.add_module("class", nn.Identity())
        self.add_module("1", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        x = self.net(self.graph(self.label(self.code(x))))
        for name in ("kept", "class", "1"):
            x = self.get_submodule(name)(x)
        return self.branches(x.mean((2, 3)))  # type: ignore[no-any-return]


class BatchFirst(Base):
    def forward(self, x: Tensor) -> Tensor:
        batch, *_ = x.shape
        x = self.c(self.b(self.a(x)))
        return self.fc(functional.adaptive_avg_pool2d(x, 1).view(batch, -1))  # type: ignore[no-any-return]


class Folded(Base):
    """Patches in the batch axis, and back."""

    def forward(self, x: Tensor) -> Tensor:
        rows, channels, height, width = x.shape
        x = self.a(x.view(rows, channels, 2, height // 2, width).transpose(1, 2).reshape(rows * 2, channels, -1, width))
        return self.fc(self.c(self.b(x)).mean((2, 3)).view(rows, 2, -1).mean(1))  # type: ignore[no-any-return]


class Table(Base):
    """A position table that is made in forward, and used twice."""

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype) / x.shape[-1]
        x = self.a(x + places)
        x = self.c(self.b(x + places))
        return self.fc(x.mean((2, 3)) + places.sum())  # type: ignore[no-any-return]


class Record(NamedTuple):
    logits: Tensor
    features: Tensor


class Recorded(Base):
    def forward(self, x: Tensor) -> Record:
        x = self.a(x)
        return Record(self.rest(x), x)


class Named(Base):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(x)}


class Checkpointed(Base):
    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return self.rest(checkpoint(self.a, x, use_reentrant=False))


class TwiceNormed(Base):
    """One norm without weights in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.norm(functional.relu(self.norm(self.a(x)))))


class Chunked(Base):
    def forward(self, x: Tensor) -> Tensor:
        one, two = self.a(x).chunk(2, 1)
        most, _ = torch.stack([one, two]).max(0)
        return self.rest(torch.cat((most, two.clone().mul_(0.5)), 1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.embed, self.encoder, self.fc = nn.Conv2d(3, 16, 4, 4), nn.TransformerEncoder(layer, 3), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.fc(self.encoder(tokens).mean(1))  # type: ignore[no-any-return]


class LayerDrop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not (self.training and random.random() < 0.3):
                x = layer(x)
        return x


class LayersDropped(Base):
    def __init__(self) -> None:
        super().__init__()
        self.drop = LayerDrop()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.drop(self.a(x)))


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).float()  # type: ignore[no-any-return]


class AutocastInside(Base):
    def __init__(self) -> None:
        super().__init__()
        self.low = Autocast()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.low(self.a(x)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.mean().item() > -1e9 else x


class GatedInside(Base):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gated()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.gate(self.a(x)))


def hooked_root() -> nn.Module:
    model = Base()
    model.register_forward_pre_hook(lambda module, args: ((args[0] - 3.0) / 2.0,))
    return model


def hooked_block() -> nn.Module:
    model = Base()
    model.a.register_forward_hook(lambda module, args, output: output * 2)
    return model


def hooked_layer() -> nn.Module:
    model = Base()
    model.a[0].register_forward_hook(lambda module, args, output: output + 1)
    return model


def hooked_gradient() -> nn.Module:
    model = Base()

    def tripled(module: nn.Module, inside: Any, outside: Any) -> Any:
        return tuple(gradient * 3 for gradient in inside)

    model.b.register_full_backward_hook(tripled)
    return model


def weight_normed() -> nn.Module:
    model = Base()
    nn.utils.parametrizations.weight_norm(model.a[0])
    return model


EQUAL: dict[str, tuple[Callable[[], nn.Module], int]] = {
    kind.__name__: (kind, least)
    for kind, least in (
        (Base, 3), (NoGrad, 2), (Detached, 3), (SwitchedOff, 3), (FrozenLayer, 3), (Signs, 3), (Reversed, 3),
        (SignLayers, 3), (FrozenNorms, 3), (AlwaysDrops, 3), (norm_in_eval_mode, 3), (Counting, 3), (Rebound, 3),
        (FreshConstant, 3), (Filled, 3), (OfTheFile, 3), (Plain, 3), (Grown, 3), (GrownBuffer, 3), (Flag, 3),
        (Mask, 3), (Shaped, 3), (Sliced, 3), (DropPath, 3), (StochasticLayers, 3), (OddNames, 3), (BatchFirst, 3),
        (Folded, 1), (Table, 3), (Recorded, 3), (Named, 3), (Checkpointed, 3), (TwiceNormed, 3), (Chunked, 3),
        (Encoder, 3), (LayersDropped, 3), (AutocastInside, 3), (GatedInside, 3), (hooked_root, 3), (hooked_block, 3),
        (hooked_layer, 3), (hooked_gradient, 3), (weight_normed, 3),
    )
}  # fmt: skip


def logits(output: Any) -> Tensor:
    found = output["logits"] if isinstance(output, dict) else getattr(output, "logits", output)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("name", EQUAL)
def test_what_is_cut_is_what_was_written(name: str) -> None:
    cut_is_what_was_written(name, *EQUAL[name])


def cut_is_what_was_written(name: str, make: Callable[[], nn.Module], least: int) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(4, 3, 16, 16)
    twin = copy.deepcopy(model)
    before = {key: tensor.clone() for key, tensor in state_of(model).items()}
    modes = [module.training for module in model.modules()]
    numbers = torch.get_rng_state(), random.getstate()
    modules = partition(model, x).modules
    assert len(modules) >= least
    assert torch.equal(numbers[0], torch.get_rng_state())
    assert numbers[1] == random.getstate()
    assert [module.training for module in model.modules()] == modes
    assert state_of(model).keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in state_of(model).items())
    for training in (False, True):
        outputs = []
        for network in (twin, modules):
            torch.manual_seed(1)
            random.seed(1)
            numpy.random.seed(1)
            z = x
            if isinstance(network, nn.Module):
                network.train(training)
                if name == "norm_in_eval_mode":
                    network.get_submodule("a.1").eval()
                z = logits(network(z))
            else:
                for module in network:
                    module.train(training)
                    z = module(z)
            z.square().sum().backward()
            outputs.append(z.detach())
        assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
        wanted = dict(twin.named_parameters())
        for key, parameter in model.named_parameters():
            other = wanted[key].grad
            assert (parameter.grad is None) == (other is None), key
            if parameter.grad is not None and other is not None:
                assert torch.allclose(parameter.grad, other, rtol=1e-3, atol=1e-4), key
        for key, tensor in state_of(twin).items():
            if name in ("Checkpointed", "Reentrant") or key not in state_of(model):
                continue  # its own second pass moves its statistics once more; or what forward leaves behind
            assert torch.allclose(state_of(model)[key].float(), tensor.float(), atol=1e-5), key


class CountingItself(Base):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return super().forward(x)  # type: ignore[no-any-return]


class AutocastItself(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.b(x)
        return self.fc(self.c(x.float()).mean((2, 3)))  # type: ignore[no-any-return]


class DropsItself(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.rest(x if random.random() < 0.5 else x * 2)


class LooksItself(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.rest(x if x.mean() > 0 else -x)


class OneSample(Base):
    """Another network for one sample than for several."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.rest(x * 2 if len(x) == 1 else x)


class Quadratic(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.a(x) / (len(x) * len(x)))


class Hooked(Base):
    """A gradient that is changed on the way."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.requires_grad:
            x.register_hook(lambda grad: grad * 2)
        return self.rest(x)


class Stepping(Base):
    """Something else every other time, by a number that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.times = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.times[0] += 1
        return self.rest(self.a(x) * (1.0 if self.times[0] < 5 else 2.0))


class Clipping(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.get_submodule("a.0").get_parameter("weight").data.mul_(0.99)
        return super().forward(x)  # type: ignore[no-any-return]


class Ragged(Base):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.a(x)
        return {"features": x, "scores": self.rest(x)}


def untied() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 768), nn.Linear(768, 10))
    model[3].weight.data = model[1].weight.data
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (CountingItself, rf"{HERE}:\d+: it computes something else in train mode"),
        (Stochastic, rf"{HERE}:\d+: it computes something else in train mode"),
        (AutocastItself, rf"{HERE}:\d+: it switches autocast"),
        (DropsItself, rf"{HERE}:\d+: it draws from Python's"),
        (LooksItself, rf"{HERE}:\d+: it tests values that depend on the data"),
        (OneSample, r"gives other results for 1 samples"),
        (Quadratic, r"gives other results for 5 samples|is not cut"),
        (Hooked, rf"{HERE}:\d+: it .*register_hook"),
        (Stepping, r"depends on times\.0, a number"),
        (Clipping, rf"{HERE}:\d+: |changes its parameter a\.0\.weight"),
        (Ragged, r"with features, scores, expected one tensor"),
        (untied, r"1\.weight and 3\.weight are two tensors in the same memory"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_line(make: Callable[[], nn.Module], message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(PartitionError, match=message) as caught:
        partition(make(), torch.randn(4, 3, 16, 16))
    assert caught.value.hint


def test_wrappers_are_looked_through_and_lazy_layers_made() -> None:
    x = torch.randn(2, 3, 16, 16)
    assert len(partition(nn.DataParallel(Base()), x).modules) == 3
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LazyLinear(10))
    assert len(partition(lazy, x).modules) == 2
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)))
    with pytest.raises(PartitionError, match="TorchScript"):
        partition(scripted, x)
