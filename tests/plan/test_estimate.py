"""The bytes foretold for any module equal the bytes that a real training step takes."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.model.bounds import even_bounds
from ondevice_trgl.model.heads import head_behind
from ondevice_trgl.model.partition import group
from ondevice_trgl.model.store import evict, is_evicted, state_of
from ondevice_trgl.model.trace import Chain, trace
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.plan.costs import Affine, Envelope
from ondevice_trgl.plan.estimate import estimate
from ondevice_trgl.plan.live_bytes import LiveBytes
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.trgl.step import Objective, train_step

SHAPE = (3, 12, 12)


def chain_of(name: str) -> Chain:
    torch.manual_seed(0)
    return trace(build_model(name, num_classes=10, in_shape=SHAPE), torch.randn(2, *SHAPE))


def measured_bytes(
    chain: Chain, bounds: tuple[int, ...], index: int, config: TrainConfig, micro: int, count: int
) -> int:
    """Peak of two real training steps of one module, its weights and its input buffer counted."""
    modules = group(chain, bounds).modules
    module = modules[index]
    last = index == len(modules) - 1
    head = None if last else head_behind(module, config.head, chain.num_outputs)
    objective = Objective(
        module,
        head,
        tau=config.tau_value,
        transport=config.transport,
        transport_norm=config.transport_norm,
        label_smoothing=config.label_smoothing,
    )
    objective.train_mode(True)
    optimizer = Optimizer(config.optimizer, objective.parameters(), momentum=config.momentum, weight_decay=1e-4)
    z, labels = torch.randn(micro, *module.in_shape), torch.zeros(micro, dtype=torch.int64)
    held = [z, *state_of(module).values(), *(state_of(head).values() if head is not None else ())]
    with LiveBytes() as live:
        for _ in range(2):
            train_step(objective, optimizer, [(z, labels)] * count, count, 0.01)
    weights: int = sum(tensor.untyped_storage().nbytes() for tensor in held)
    return int(live.peak) + weights


SETTINGS: list[dict[str, Any]] = [
    {},
    {"optimizer": "adamw", "head": "pooled-linear"},
    {"tau": "off", "head": "conv"},
    {"transport": "displacement", "transport_norm": "sum"},
]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("resnet-small", SETTINGS[0]), ("resnet-small", SETTINGS[3])]
    + [("resnet-preact-3x16", settings) for settings in SETTINGS[:3]],
    ids=str,
)
def test_module_bytes_are_those_of_a_real_step(name: str, settings: dict[str, Any]) -> None:
    chain, config = chain_of(name), TrainConfig(**settings)
    costs = estimate(chain, config)
    for count in (1, 2, len(chain.segments)):
        bounds = even_bounds(chain, count)
        for micro in (3, 40):  # weights dominate the first, activations the second
            for index, (start, stop) in enumerate(pairwise(bounds)):
                foretold = costs.module_bytes(start, stop, micro, accumulate=False)
                real = measured_bytes(chain, bounds, index, config, micro, 1)
                assert real <= foretold * 1.005, (bounds, index, micro)
                assert foretold <= real * 1.03, (bounds, index, micro)


@pytest.mark.parametrize("name", ["resnet-small", "resnet-preact-3x16"])
def test_module_bytes_bound_a_real_accumulated_step_closely(name: str) -> None:
    chain, config = chain_of(name), TrainConfig()
    costs = estimate(chain, config)
    bounds = even_bounds(chain, 3)
    for index, (start, stop) in enumerate(pairwise(bounds)):
        foretold = costs.module_bytes(start, stop, 8, accumulate=True)
        real = measured_bytes(chain, bounds, index, config, 8, 3)
        assert real <= foretold * 1.005
        assert foretold <= real * 1.12


@pytest.mark.parametrize("frozen", [2, 4, 6])
def test_nothing_is_kept_for_layers_that_are_frozen_up_to_the_first_that_is_not(frozen: int) -> None:
    chain, config = chain_of("resnet-small"), TrainConfig()
    for module in group(chain, range(len(chain.segments) + 1)).modules[:frozen]:
        module.requires_grad_(False)
    costs = estimate(chain, config)
    for bounds in (even_bounds(chain, count) for count in (1, 2, 3)):
        for index, (start, stop) in enumerate(pairwise(bounds)):
            for micro in (3, 40):
                foretold = costs.module_bytes(start, stop, micro, accumulate=False)
                real = measured_bytes(chain, bounds, index, config, micro, 1)
                assert real <= foretold * 1.005, (start, stop, micro)
                assert foretold <= real * 1.08, (start, stop, micro)  # the transport of a step that has none


class Watched(nn.Module):
    """BatchNorm and dropout, a frozen layer, a gradient that is there already, a layer in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.b, self.c, self.d = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight.requires_grad_(False)
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.drop(self.norm(self.a(x))))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [True, False])
def test_estimating_leaves_the_network_and_the_generator_untouched(training: bool) -> None:
    model = Watched().train(training)
    model.drop.train(not training)
    model.a.weight.grad = torch.full((6, 6), 3.0)
    gradient = model.a.weight.grad
    state = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    modes = {name: module.training for name, module in model.named_modules()}
    chain = trace(model, torch.randn(2, 6))
    generator = torch.get_rng_state()
    estimate(chain, TrainConfig())
    assert torch.equal(torch.get_rng_state(), generator)
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert model.a.weight.grad is gradient
    assert torch.equal(gradient, torch.full((6, 6), 3.0))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "a.weight")
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("name", ["resnet-preact-3x16", "mobilenet_v2"])
def test_what_there_is_no_room_for_is_foretold_to_the_byte_without_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, config = chain_of(name), TrainConfig()
    real = estimate(chain, config)
    evict(chain.model)
    asked: list[int] = []

    def no_memory(*modules: nn.Module | None) -> None:
        raise AssertionError("it was given memory")

    monkeypatch.setattr("ondevice_trgl.plan.estimate._fits", lambda size: asked.append(size))
    monkeypatch.setattr("ondevice_trgl.plan.estimate.fill_with_noise", no_memory)
    foretold = estimate(chain, config)
    assert max(asked) > 2 * max(cost.parameters for cost in real.segments)
    assert is_evicted(chain.model)
    length = len(chain.segments)
    for start, stop in [(0, length), *((i, i + 1) for i in range(length))]:
        for micro in (2, 32):
            sizes = [costs.module_bytes(start, stop, micro, accumulate=False) for costs in (real, foretold)]
            assert sizes[0] == sizes[1]


class Stubborn(nn.Module):
    """Makes a tensor in memory, whatever device it is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(1, device="cpu").expand(6)


def test_what_cannot_be_foretold_without_memory_is_given_some(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = trace(nn.Sequential(nn.Linear(6, 6), Stubborn(), nn.Linear(6, 3)), torch.randn(2, 6))
    real = estimate(chain, TrainConfig())
    evict(chain.model)
    monkeypatch.setattr("ondevice_trgl.plan.estimate._fits", lambda size: False)
    assert estimate(chain, TrainConfig()) == real
    assert is_evicted(chain.model)


def test_bytes_grow_with_the_batch_and_with_the_module() -> None:
    chain = chain_of("resnet-preact-3x16")
    costs = estimate(chain, TrainConfig())
    length = len(chain.segments)
    sizes = [costs.module_bytes(0, length, micro, accumulate=False) for micro in (1, 2, 8, 64)]
    assert sizes == sorted(set(sizes))
    parts = [costs.module_bytes(0, stop, 32, accumulate=False) for stop in range(1, length + 1)]
    assert parts == sorted(parts)
    assert costs.module_bytes(0, length, 8, accumulate=True) >= costs.module_bytes(0, length, 8, accumulate=False)


def test_parameters_and_buffers_are_the_whole_network() -> None:
    chain = chain_of("resnet-small")
    total = sum(t.numel() * t.element_size() for t in state_of(chain.model).values())
    costs = estimate(chain, TrainConfig())
    assert sum(cost.parameters + cost.buffers for cost in costs.segments) == total


def test_token_inputs_are_estimated() -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Flatten(), nn.Linear(40, 3))
    chain = trace(model, torch.randint(0, 20, (2, 5)))
    costs = estimate(chain, TrainConfig())
    assert costs.input_bytes == 5 * 8
    assert costs.module_bytes(0, len(chain.segments), 4, accumulate=False) > sum(
        cost.parameters for cost in costs.segments
    )


def test_an_envelope_is_the_largest_line_at_every_batch() -> None:
    lines = [(100, 101), (10, 30), (90, 94), (5, 5)]
    envelope = Envelope.through([a for a, _ in lines], [b for _, b in lines])
    assert len(envelope.lines) < len(lines)
    for batch in (0, 1, 2, 4, 9, 50):
        assert envelope(batch) == max(Affine.through(a, b)(batch) for a, b in lines)
    assert Envelope.through([1, 5], [9]).lines == (Affine.through(5, 9),)


def test_gradients_are_those_alive_when_the_sum_is_largest() -> None:
    """At a tiny batch the update decides, and holds every gradient; at a large one activations do."""
    chain = chain_of("resnet-small")
    costs, length = estimate(chain, TrainConfig(head="pooled-linear")), len(chain.segments)
    weights = sum(cost.parameters for cost in costs.segments)
    small, large = (costs.tensors(0, length, micro, accumulate=False) for micro in (1, 256))
    assert small.gradients > 0.9 * weights
    assert large.gradients < 0.1 * weights
    assert large.activations > 100 * small.activations
    again = costs.tensors(0, length, 256, accumulate=True)
    assert again.gradients >= weights
    first = costs.tensors(0, 2, 64, accumulate=True)
    head = costs.heads[1]
    assert head is not None
    assert first.head >= 3 * head.parameters
