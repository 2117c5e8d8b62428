"""What a local module takes in memory: each segment is run once at two tiny batches, and the bytes are extrapolated.

A forward and a backward pass of every segment on its own, at batch 2 and 4, under `LiveBytes`: exact for tensors. After
each operator the bytes alive are affine in the batch, so that their peak is the largest of many straight lines: weight
gradients may make it at batch 4, and activations at batch 64. The bytes of any group of segments follow by simulating
its forward and backward pass.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.model.heads import build_head
from ondevice_trgl.model.partition import LocalModule
from ondevice_trgl.model.store import evict, state_of
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
class Envelope:
    """The largest of several straight lines, in bytes."""

    lines: tuple[Affine, ...]

    def __call__(self, batch: int) -> float:
        return max(line(batch) for line in self.lines)

    @classmethod
    def through(cls, at_small: list[int], at_large: list[int]) -> "Envelope":
        """Of two timelines of the same operators; of their peaks alone where the operators differ."""
        if len(at_small) != len(at_large):
            return cls((Affine.through(max(at_small), max(at_large)),))
        lines = {Affine.through(a, b) for a, b in zip(at_small, at_large, strict=True)}
        kept: list[Affine] = []
        for line in sorted(lines, key=lambda line: (-line.slope, -line.constant)):
            if not kept or line.constant > kept[-1].constant:  # else it lies below one of steeper slope
                kept.append(line)
        return cls(tuple(kept))


@dataclass(frozen=True)
class Cost:
    """Bytes of one segment or head, its input not counted."""

    parameters: int
    buffers: int
    sizes: tuple[int, ...]
    """Of its parameters, in the order of the update."""
    saved: Affine
    """Alive behind the forward pass for its own backward pass."""
    output: Affine
    """Its output, where `saved` does not hold it already."""
    keeps_input: bool
    """Whether its backward pass needs its input."""
    forward_peak: Envelope
    backward_peak: Envelope
    """From the start of the forward pass: saved tensors, gradients of parameters and input."""
    entry_peak: Envelope
    """The same where it comes first, and no gradient of its input is computed."""


@dataclass(frozen=True)
class Costs:
    """Costs of all segments of a chain, and of the auxiliary head behind each."""

    segments: tuple[Cost, ...]
    heads: tuple[Cost | None, ...]
    """Behind segment i; None behind the last."""
    input_bytes: int
    """Of one sample."""
    output_bytes: tuple[int, ...]
    """Boundary activation behind segment i of one sample, fp32."""
    optimizer: str
    momentum: float
    scratch: tuple[Affine, ...] = ()
    """What kernels take for themselves, of each segment; empty where it was not measured."""

    def scratch_bytes(self, start: int, stop: int, micro_batch: int) -> int | None:
        """Scratch of segments `start` to `stop` as one module: the most that one of them takes. None: not measured."""
        if not self.scratch:
            return None
        return int(max(scratch(micro_batch) for scratch in self.scratch[start:stop]))

    def largest_batch(self, most: int, room_bytes: int) -> int:
        """The largest batch of at most `most`, by halves, at which every segment alone takes `room_bytes` or less.

        1 where there is none.
        """
        batch = most
        while batch > 1 and any(
            self.module_bytes(k, k + 1, batch, accumulate=False) > room_bytes for k in range(len(self.segments))
        ):
            batch //= 2
        return batch

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
        peak, alive, passed, rest = 0.0, 0.0, 0.0, float(parameters)
        for index, part in enumerate(parts):
            rest -= part.parameters
            before = parameters if accumulate else 0  # gradients of earlier micro-batches
            behind = parameters if accumulate else rest  # and of the later parts, when backward gets here
            peak = max(peak, alive + passed + part.forward_peak(micro_batch) + before)
            if part.keeps_input:
                alive += passed
            backward = part.backward_peak if index else part.entry_peak
            peak = max(peak, alive + backward(micro_batch) + behind)
            alive += part.saved(micro_batch)
            passed = part.output(micro_batch)
        for size in (size for part in parts for size in part.sizes):  # the update drops one gradient after the other
            peak = max(peak, parameters + Optimizer.update_bytes(self.optimizer, size))
            parameters -= size
        return int(resident + peak)


def estimate(chain: Chain, config: TrainConfig, *, throw_away: bool = False) -> Costs:
    """Measure every segment of `chain` and the heads that `config` names. The model is left as it was.

    With `throw_away` each segment is evicted once it is measured: for a chain whose tensors hold nothing, as a
    blueprint gives it. Memory: the network's weights (with `throw_away` those of one segment), and the activations of
    one segment at batch 4.
    """
    segments, heads, outputs = [], [], []
    with contextlib.nullcontext() if throw_away else _untouched(chain.model):
        for index, segment in enumerate(chain.segments):
            module = LocalModule.of(chain, index, index + 1)
            shape = chain.segments[index - 1].out_shape if index else chain.in_shape
            dtype = torch.float32 if index else chain.in_dtype
            last = index == len(chain.segments) - 1
            segments.append(_measure(module, _runner(module, config, last=last), shape, dtype))
            if throw_away:
                evict(module)
                release_memory()
            outputs.append(4 * _elements(segment.out_shape))
            heads.append(None if last else _head(config.head, segment.out_shape, chain.num_outputs))
    return Costs(
        tuple(segments),
        tuple(heads),
        _elements(chain.in_shape) * chain.in_dtype.itemsize,
        tuple(outputs),
        config.optimizer,
        config.momentum,
    )


Runner = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Input -> (scalar to start backward from, output)."""


def _runner(module: LocalModule, config: TrainConfig, *, last: bool) -> Runner:
    measured = None
    if config.tau_value is not None and has_transport(module, config.transport):
        measured = with_transport(module, config.transport, config.transport_norm).train()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        out, transport = measured(x) if measured is not None else (module(x), None)
        loss = _task(out) if last else seed(out)
        return loss if transport is None else loss + transport, out

    return run


def _task(logits: Tensor) -> Tensor:
    return functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))


def _head(name: str, shape: tuple[int, ...], classes: int) -> Cost:
    head = build_head(name, shape, classes)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(x)
        return _task(logits), logits

    return _measure(head, run, shape, torch.float32)


def _measure(module: nn.Module, run: Runner, shape: tuple[int, ...], dtype: torch.dtype) -> Cost:
    module.train()
    small, large = (_once(module, run, (batch, *shape), dtype, inner=True) for batch in (SMALL, LARGE))
    first = [_once(module, run, (batch, *shape), dtype, inner=False).backward for batch in (SMALL, LARGE)]
    sizes = [p.numel() * p.element_size() for p in module.parameters()]
    total = sum(t.numel() * t.element_size() for t in state_of(module).values())
    return Cost(
        parameters=sum(sizes),
        buffers=total - sum(sizes),
        sizes=tuple(sizes),
        saved=Affine.through(small.saved, large.saved),
        output=Affine.through(small.output, large.output),
        keeps_input=large.keeps_input,
        forward_peak=Envelope.through(small.forward, large.forward),
        backward_peak=Envelope.through(small.backward, large.backward),
        entry_peak=Envelope.through(*first),
    )


@dataclass(frozen=True)
class _Pass:
    """One forward and backward pass: bytes alive behind forward, and after each operator of either."""

    saved: int
    output: int
    keeps_input: bool
    forward: list[int]
    backward: list[int]


def _once(module: nn.Module, run: Runner, shape: tuple[int, ...], dtype: torch.dtype, *, inner: bool) -> _Pass:
    for parameter in module.parameters():
        parameter.grad = None
    if dtype.is_floating_point:
        leaf = torch.randn(shape, dtype=dtype, requires_grad=inner)
        x = leaf.clone()  # a segment may change its input in place, which a leaf forbids
    else:
        x = torch.zeros(shape, dtype=dtype)
    storage = weakref.ref(x.untyped_storage())
    with torch.enable_grad(), LiveBytes() as live:
        loss, out = run(x)
        forward, whole = live.timeline, live.current
        del out, x
        saved, keeps_input = live.current, storage() is not None
        live.restart()
        if loss.requires_grad:  # not where everything is frozen
            loss.backward()
        backward = live.timeline
    for parameter in module.parameters():
        parameter.grad = None
    return _Pass(saved, whole - saved, keeps_input, forward, backward)


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
