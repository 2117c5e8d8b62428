"""What a local module takes in memory: each segment is run once at two tiny batches, and the bytes are extrapolated.

A forward and a backward pass of every segment on its own, at batch 2 and 4, under `LiveBytes`: exact for tensors, and
affine in the batch. The bytes of any group of segments follow by simulating its forward and backward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.model.heads import build_head
from ondevice_trgl.model.partition import LocalModule
from ondevice_trgl.model.store import state_of
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.plan.live_bytes import LiveBytes, seed
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.trgl.transport import has_transport, with_transport

SMALL, LARGE = 2, 4


@dataclass(frozen=True)
class Affine:
    """constant + slope · batch, in bytes."""

    constant: float
    slope: float

    def __call__(self, batch: int) -> float:
        return self.constant + self.slope * batch

    @classmethod
    def through(cls, at_small: float, at_large: float) -> "Affine":
        slope = (at_large - at_small) / (LARGE - SMALL)
        return cls(at_small - slope * SMALL, slope)


@dataclass(frozen=True)
class Cost:
    """Bytes of one segment or head, its input not counted."""

    parameters: int
    buffers: int
    saved: Affine
    """Alive behind the forward pass: what backward needs, and the output."""
    forward_peak: Affine
    backward_peak: Affine
    """From the start of the forward pass: saved tensors, gradients of parameters and input."""


@dataclass(frozen=True)
class Costs:
    """Costs of all segments of a chain, and of the auxiliary head behind each."""

    segments: tuple[Cost, ...]
    heads: tuple[Cost | None, ...]
    """Behind segment i; None behind the last, and where the chosen head does not fit the layout."""
    input_bytes: int
    """Of one sample."""
    output_bytes: tuple[int, ...]
    """Boundary activation behind segment i of one sample, fp32."""
    optimizer: str
    momentum: float

    @cached_property
    def parameter_bytes(self) -> int:
        """Of the whole network."""
        return sum(cost.parameters + cost.buffers for cost in self.segments)

    def module_bytes(self, start: int, stop: int, micro_batch: int, *, accumulate: bool) -> int:
        """Peak tensor bytes of training segments `start` to `stop` (exclusive) with their head as one module.

        Parameters, gradients, optimizer state, activations, the input buffer. With `accumulate`, gradients of the
        micro-batches before are alive throughout.
        """
        head = self.heads[stop - 1] if stop < len(self.segments) else None
        parts = [*self.segments[start:stop], *([head] if head else [])]
        parameters = sum(part.parameters for part in parts)
        resident = parameters + sum(part.buffers for part in parts)
        resident += Optimizer.state_bytes(self.optimizer, parameters, self.momentum)
        resident += micro_batch * (self.output_bytes[start - 1] if start else self.input_bytes)
        peak, alive, rest = 0.0, 0.0, float(parameters)
        for part in parts:
            rest -= part.parameters
            behind = parameters if accumulate else rest  # gradients of the later parts, when backward gets here
            peak = max(peak, alive + part.forward_peak(micro_batch) + (parameters if accumulate else 0))
            peak = max(peak, alive + part.backward_peak(micro_batch) + behind)
            alive += part.saved(micro_batch)
        return int(resident + max(peak, parameters))


def estimate(chain: Chain, config: TrainConfig) -> Costs:
    """Measure every segment of `chain` and the heads that `config` names. The model is left as it was.

    Memory: the network's weights, and the activations of one segment at batch 4.
    """
    tau = config.tau_value
    segments, heads, outputs = [], [], []
    with _untouched(chain.model):
        for index, segment in enumerate(chain.segments):
            module = LocalModule.of(chain, index, index + 1)
            shape = chain.segments[index - 1].out_shape if index else chain.in_shape
            dtype = torch.float32 if index else chain.in_dtype
            segments.append(_measure(module, _runner(module, config, tau), shape, dtype))
            outputs.append(4 * _elements(segment.out_shape))
            last = index == len(chain.segments) - 1
            heads.append(None if last else _head(config.head, segment.out_shape, chain.num_outputs))
    return Costs(
        tuple(segments),
        tuple(heads),
        _elements(chain.in_shape) * chain.in_dtype.itemsize,
        tuple(outputs),
        config.optimizer,
        config.momentum,
    )


def _runner(module: LocalModule, config: TrainConfig, tau: float | None) -> Callable[[Tensor], Tensor]:
    if tau is None or not has_transport(module, config.transport):
        return lambda x: seed(module(x))
    measured = with_transport(module, config.transport, config.transport_norm)

    def run(x: Tensor) -> Tensor:
        out, transport = measured(x)
        return seed(out) + torch.as_tensor(transport)

    return run


def _head(name: str, shape: tuple[int, ...], classes: int) -> Cost:
    head = build_head(name, shape, classes)

    def run(x: Tensor) -> Tensor:
        return functional.cross_entropy(head(x), torch.zeros(len(x), dtype=torch.int64))

    return _measure(head, run, shape, torch.float32)


def _measure(module: nn.Module, run: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Cost:
    module.train()
    rows = [_once(module, run, (batch, *shape), dtype) for batch in (SMALL, LARGE)]
    saved, forward, backward = (Affine.through(a, b) for a, b in zip(*rows, strict=True))
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    total = sum(t.numel() * t.element_size() for t in state_of(module).values())
    return Cost(parameters, total - parameters, saved, forward, backward)


def _once(
    module: nn.Module, run: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[int, int, int]:
    for parameter in module.parameters():
        parameter.grad = None
    if dtype.is_floating_point:
        leaf = torch.randn(shape, dtype=dtype, requires_grad=True)
        x = leaf.clone()  # a segment may change its input in place, which a leaf forbids
    else:
        x = torch.zeros(shape, dtype=dtype)
    with torch.enable_grad(), LiveBytes() as live:
        loss = run(x)
        saved, forward = live.current, live.peak
        del x
        live.restart_peak()
        loss.backward()
        backward = live.peak
    for parameter in module.parameters():
        parameter.grad = None
    return saved, forward, backward


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Puts back what a training step changes: buffers, gradients, train mode, the random generator."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
