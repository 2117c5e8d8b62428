"""More networks as people write them: what they keep, change and count in Python while they run."""

import copy
import functools
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ondevice_trgl.errors import PartitionError
from ondevice_trgl.model.partition import partition
from tests.model.test_own_networks import Base, cut_is_what_was_written

HERE = Path(__file__).name


class KeepsActivations(Base):
    """As attributes, in a dict and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Any] = {}
        self.seen: list[Any] = []
        self.by_name: dict[str, list[int]] = {"sides": []}

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.last = x
        self.features["a"] = x.detach()
        self.seen.append(x)
        self.by_name["sides"].append(x.shape[-1])
        return self.rest(x)


class Caches(Base):
    """A table that is made in the first pass and kept."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.table is None or self.table.shape[-1] != x.shape[-1]:
            self.table = torch.linspace(0, 1, x.shape[-1])
        return self.rest(x + self.table)


class Registers(Base):
    """A buffer that is registered anew in each pass."""

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.register_buffer("scale", torch.full((len(x), 1, 1, 1), 0.5), persistent=False)
        return self.rest(x * self.scale)


@functools.cache
def table_of(side: int) -> Tensor:
    return torch.linspace(0, 1, side)


class CachesElsewhere(Base):
    """In a cache that is not of the network."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.rest(x + table_of(x.shape[-1]))


class Counts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.rest(self.a(x))


class WarmsUpInside(Base):
    """A module that does more and more, by a number of its own: kept whole."""

    class Warm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.passes, self.inner = 0, nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return self.inner(x * min(1.0, self.passes / 1e9))  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.warm = self.Warm()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.rest(x + self.warm(x))


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
    swish = torch.jit.script(_swish)


class Scripted(Base):
    """A function of TorchScript between layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(swish(self.a(x)))


class Reentrant(Base):
    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        x = checkpoint(self.b, self.a(x), use_reentrant=True)
        return self.fc(self.c(x).mean((2, 3)))  # type: ignore[no-any-return]


class NumpySkips(Base):
    """Stochastic depth by numpy's numbers."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            if self.training and np.random.rand() < 0.5:
                return x
            return x + self.inner(x)  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.skips = nn.ModuleList(self.Skip() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for skip in self.skips:
            x = skip(x)
        return self.rest(x)


class Bits(Base):
    """Operators between a number and a tensor of whole numbers."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        small = (x * 4).int().clamp(0, 3)
        bits = (1 << small) + (16 >> small) + (7 & small) + (8 | small) + (3 ^ small)
        return self.rest(x + 0.01 * bits)


class Retains(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.requires_grad:
            x.retain_grad()
        return self.rest(x)


class Held(nn.Conv2d):
    """A filter whose norm is held in forward, as in EEGNet."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.25)
        return super().forward(x)


class HoldsNorms(Base):
    def __init__(self) -> None:
        super().__init__()
        self.held = Held(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.held(self.a(x)))


class Phased(Base):
    """Complex weights, over frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(8, 16, 9, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.rest(torch.fft.irfft2(torch.fft.rfft2(x) * self.filter, s=x.shape[-2:]))


class Halves(Base):
    """bfloat16 in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.b.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(self.b(self.a(x).bfloat16()).float()).mean((2, 3)))  # type: ignore[no-any-return]


class Energy(Base):
    """A module with a backward pass of its own inside."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                y = x if x.requires_grad else x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.inner(y).square().sum(), y, create_graph=True)
            return x - 0.1 * slope

    def __init__(self) -> None:
        super().__init__()
        self.step = self.Step()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.step(self.a(x)))


def spectral_normed() -> nn.Module:
    model = Base()
    nn.utils.spectral_norm(model.b[0])  # the older way, by hooks
    return model


class RemembersInside(Base):
    """With its gradient, in a module that is then kept whole."""

    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.before = nn.Identity(), list[Tensor]()

        def forward(self, x: Tensor) -> Tensor:
            old = self.before[-1].mean() if self.before else 0.0
            self.before.append(x.detach())
            return self.inner(x + old)  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.memory = self.Memory()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.memory(self.a(x)))


MORE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    kind.__name__: (kind, least)
    for kind, least in (
        (KeepsActivations, 3), (Caches, 3), (Registers, 3), (CachesElsewhere, 3), (Counts, 3), (WarmsUpInside, 3),
        (Scripted, 3), (Reentrant, 3), (NumpySkips, 3), (Bits, 3), (Retains, 3), (HoldsNorms, 3), (Energy, 3),
        (spectral_normed, 3), (Phased, 3), (Halves, 3),
        (RemembersInside, 3),
    )
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", MORE)
def test_what_is_cut_is_what_was_written(name: str) -> None:
    table_of.cache_clear()
    cut_is_what_was_written(name, *MORE[name])


def test_lists_and_dicts_of_a_network_hold_what_they_held() -> None:
    model = KeepsActivations()
    partition(model, torch.randn(2, 3, 16, 16))
    assert (model.features, model.seen, model.by_name) == ({}, [], {"sides": []})
    assert not hasattr(model, "last")
    other = Registers()
    partition(other, torch.randn(2, 3, 16, 16))
    assert not other._non_persistent_buffers_set


class WarmsUp(Base):
    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        return self.rest(self.a(x) * min(1.0, self.passes / 100))


class Switches(Base):
    """To something else, after a thousand passes."""

    def __init__(self) -> None:
        super().__init__()
        self.counters = {"passes": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.counters["passes"] += 1
        x = self.a(x)
        return self.rest(x if self.counters["passes"] < 1000 else x.relu())


class Averages(Base):
    """Weights that follow those of another layer, in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = block_of(self.a)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.a.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)
        return self.rest(self.a(x) + self.slow(x).detach())


def block_of(block: nn.Module) -> nn.Module:
    return copy.deepcopy(block).requires_grad_(False)


class Shrinks(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.mul_(0.9)
        return super().forward(x)


class ShrinksInside(HoldsNorms):
    def __init__(self) -> None:
        super().__init__()
        self.held = Shrinks(8, 8, 3, padding=1)  # type: ignore[assignment]


class Rescales(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.fc.weight.data = functional.normalize(self.fc.weight.data)
        return super().forward(x)  # type: ignore[no-any-return]


class Loose(Base):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Conv2d(8, 8, 1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.layers[0](self.a(x)))


class Called(Base):
    """With other weights than its own."""

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: 1.1 * weight for name, weight in self.b.named_parameters()}
        return self.fc(self.c(torch.func.functional_call(self.b, weights, (self.a(x),))).mean((2, 3)))  # type: ignore[no-any-return]


class OfNumpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        places = torch.from_numpy(np.arange(len(x), dtype=np.float32))
        return self.rest(self.a(x) + places[:, None, None, None])


class SetsData(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x.data = x.data * 0.5
        return self.rest(x)


class Sparse(Base):
    links: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("links", torch.eye(10).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.links, super().forward(x).T).T  # type: ignore[no-any-return]


class DoesNotTrain(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        x += 1
        return self.rest(x)


class Decoder(nn.Module):
    """Uses a weight that another layer holds."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other, self.own = [other], nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.own + self.other[0].get_parameter("weight"), padding=1)


class TiedByList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = Decoder(self.first)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.second(self.first(self.a(x)).relu()))


def hooked_with_another() -> nn.Module:
    model = Base()
    model.scale = nn.Parameter(torch.ones(8, 1, 1))
    model.a[0].register_forward_hook(lambda module, args, output: output * model.scale)
    return model


def stepped_in_backward() -> nn.Module:
    model = Base()

    def step(parameter: Tensor) -> None:
        parameter.grad = None

    model.fc.weight.register_post_accumulate_grad_hook(step)
    return model


class Wide(Base):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(8, 1, 1, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest((self.a(x) * self.phase).abs().float())


class Remembers(Base):
    """What the pass before has made."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.before is None or self.before.shape != x.shape:
            self.before = torch.zeros_like(x)
        x = x + 0.5 * self.before
        self.before = x.detach()
        return self.rest(x)


class RemembersInADict(Base):
    def __init__(self) -> None:
        super().__init__()
        self.state = {"mean": torch.zeros(8)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.state["mean"] = 0.9 * self.state["mean"] + 0.1 * x.detach().mean((0, 2, 3))
        return self.rest(x - self.state["mean"][:, None, None])


class ChangesADict(RemembersInADict):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.state["mean"].mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
        return self.rest(x - self.state["mean"][:, None, None])


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.fc = nn.Linear(48, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.permute(0, 2, 1, 3).flatten(2))
        lengths = torch.full((len(x),), x.size(1))
        packed, _ = self.lstm(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))
        return self.fc(nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0][:, -1])  # type: ignore[no-any-return]


class SoftInEvalMode(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.training else x.softmax(-1)


def hooked_whole() -> nn.Module:
    model = Base()
    model.register_full_backward_hook(lambda module, inside, outside: None)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (WarmsUp, rf"{HERE}:\d+: it depends on passes, a number that forward changes"),
        (Switches, r"it depends on counters\.passes, a number"),
        (Averages, rf"{HERE}:\d+: it changes a parameter"),
        (ShrinksInside, r"changes its parameter held\.weight"),
        (Rescales, rf"{HERE}:\d+: it changes a parameter"),
        (Loose, rf"{HERE}:\d+: it uses a parameter that no module of it holds"),
        (Called, rf"{HERE}:\d+: it calls b with other parameters"),
        (OfNumpy, rf"{HERE}:\d+: it uses a tensor that was not made by calls of torch"),
        (SetsData, rf"{HERE}:\d+: it sets an attribute of a tensor"),
        (Sparse, r"links is a tensor of layout torch\.sparse_coo"),
        (DoesNotTrain, r"does not train: one of the variables"),
        (SoftInEvalMode, rf"{HERE}:\d+: it computes something else in train mode"),
        (TiedByList, r"second uses the parameter first\.weight, which it does not hold"),
        (hooked_with_another, r"a uses the parameter scale, which it does not hold"),
        (stepped_in_backward, r"fc\.weight has a hook behind its gradient"),
        (Wide, r"phase has dtype complex128"),
        (Remembers, rf"{HERE}:\d+: it reads what an earlier pass has left behind"),
        (RemembersInADict, rf"{HERE}:\d+: it reads what an earlier pass has left behind"),
        (ChangesADict, rf"{HERE}:\d+: it changes a tensor that is neither a buffer"),
        (Packed, rf"{HERE}:\d+: it calls with a PackedSequence"),
        (hooked_whole, r"it has a hook on its backward pass"),
    ],
)
def test_what_cannot_be_cut_is_refused_and_left_as_it_was(make: Callable[[], nn.Module], message: str) -> None:
    torch.manual_seed(0)
    model = make()
    before = [(parameter, parameter.data_ptr(), parameter.detach().clone()) for parameter in model.parameters()]
    with pytest.raises(PartitionError, match=message) as caught:
        partition(model, torch.randn(4, 3, 16, 16))
    assert caught.value.hint
    assert not any(value.any() for value in getattr(model, "state", {}).values())
    for parameter, place, value in before:
        assert torch.equal(parameter, value)
        assert parameter.data_ptr() == place


def test_networks_are_traced_in_several_threads_and_torch_is_as_it_was() -> None:
    own = nn.Module.__call__, nn.Module.__setattr__, torch.jit.ScriptFunction.__call__
    apply = torch.autograd.Function.__dict__["apply"]
    found: list[int] = []

    def work() -> None:
        for _ in range(3):
            found.append(len(partition(Base(), torch.randn(2, 3, 16, 16)).modules))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [3] * 9
    assert (nn.Module.__call__, nn.Module.__setattr__, torch.jit.ScriptFunction.__call__) == own
    assert torch.autograd.Function.__dict__["apply"] is apply
