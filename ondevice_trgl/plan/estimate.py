"""What a local module takes in memory: each segment is run once at two tiny batches, and the bytes are extrapolated.

A forward and a backward pass of every segment on its own, at batch 2 and 4, under `LiveBytes`: exact for tensors. The
bytes of any group of segments follow by simulating its forward and backward pass (`Costs.module_bytes`). Segments that
are alike, as the blocks of a stage are, are measured once.
"""

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.device.pages import release_code_pages
from ondevice_trgl.model.alike import likeness
from ondevice_trgl.model.heads import head_behind
from ondevice_trgl.model.partition import LocalModule
from ondevice_trgl.model.store import bytes_in, evict, fill_with_noise, is_evicted, shape_of, state_of
from ondevice_trgl.model.trace import Chain, Segment
from ondevice_trgl.plan.costs import LARGE, SMALL, Affine, Cost, Costs, Envelope
from ondevice_trgl.plan.live_bytes import LiveBytes, seed
from ondevice_trgl.trgl.transport import has_transport, with_transport


def estimate(chain: Chain, config: TrainConfig) -> Costs:
    """Measure every segment of `chain` and the heads that `config` names. The model is left as it was.

    Tensors that are evicted, as a blueprint gives them, are filled with noise and evicted again.
    Memory: beyond what the chain holds, one segment and its activations at batch 4.
    """
    segments: list[Cost] = []
    heads: list[Cost | None] = []
    known: dict[Any, Cost] = {}
    with _untouched(chain.model):
        for index, segment in enumerate(chain.segments):
            module = LocalModule.of(chain, index, index + 1)
            shape = chain.segments[index - 1].out_shape if index else chain.in_shape
            dtype = _dtype(chain.segments[index - 1]) if index else chain.in_dtype
            last = index == len(chain.segments) - 1
            key = likeness(module), last
            if key not in known:
                run = _runner(module, config, last=last)
                if not is_evicted(module):
                    known[key] = _measure(module, run, shape, dtype)
                elif (foretold := _without_memory(module, run, shape, dtype)) is not None:
                    known[key] = foretold
                else:
                    fill_with_noise(module)
                    known[key] = _measure(module, run, shape, dtype)
                    evict(module)
                    release_memory()
                    release_code_pages()
            segments.append(known[key])
            if last or index < chain.prefix:
                heads.append(None)
                continue
            boundary = segment.out_shape, segment.channel_axis, segment.head_limit
            if boundary not in known:
                known[boundary] = _head(segment, config.head, chain.num_outputs)
            heads.append(known[boundary])
    return Costs(
        tuple(segments),
        tuple(heads),
        math.prod(chain.in_shape) * chain.in_dtype.itemsize,
        tuple(_dtype(segment).itemsize * math.prod(segment.out_shape) for segment in chain.segments),
        config.optimizer,
        config.momentum,
    )


def _dtype(segment: Segment) -> torch.dtype:
    found: torch.dtype = segment.output.meta["dtype"]
    return found


_SPARE_BYTES = 32_000_000
"""Room that measuring a segment should have beside weights and gradients."""
Runner = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Input -> (scalar to start backward from, output)."""


def _runner(module: LocalModule, config: TrainConfig, *, last: bool) -> Runner:
    measured = None
    if config.has_transport and has_transport(module, config.transport):
        measured = with_transport(module, config.transport, config.transport_norm).train()

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        out, transport = measured(x) if measured is not None else (module(x), None)
        loss = _task(out) if last else seed(out)
        return loss if transport is None else loss + transport, out

    return run


def _task(logits: Tensor) -> Tensor:
    return functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))


def _head(segment: Segment, name: str, classes: int) -> Cost:
    head = head_behind(segment, name, classes)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(x)
        return _task(logits), logits

    return _measure(head, run, segment.out_shape, torch.float32)


def _measure(module: nn.Module, run: Runner, shape: tuple[int, ...], dtype: torch.dtype) -> Cost:
    module.train()
    small, large = (_once(module, run, (batch, *shape), dtype, inner=True) for batch in (SMALL, LARGE))
    first = [_once(module, run, (batch, *shape), dtype, inner=False) for batch in (SMALL, LARGE)]
    sizes = {p: p.numel() * p.element_size() for p in module.parameters()}
    trained = [size for p, size in sizes.items() if p.requires_grad]  # what is frozen has no gradient, as a buffer
    parameters = sum(trained)
    total = sum(t.numel() * t.element_size() for t in state_of(module).values())
    return Cost(
        parameters=parameters,
        buffers=total - parameters,
        largest=max(trained, default=0),
        kernel=max((size for p, size in sizes.items() if p.ndim >= 3), default=0),
        saved=Affine.through(small.saved, large.saved),
        output=Affine.through(small.output, large.output),
        keeps_input=large.keeps_input,
        forward_peak=Envelope.through(small.forward, large.forward),
        backward_peak=Envelope.through(small.backward, large.backward),
        entry_peak=Envelope.through(*(one.backward if trained else one.forward for one in first)),
    )


def _without_memory(module: nn.Module, run: Runner, shape: tuple[int, ...], dtype: torch.dtype) -> Cost | None:
    """The cost of an evicted module whose weights and gradients are more than this process may take; else None.

    On torch's meta device operators give tensors of the right size that hold nothing: the same bytes as on the CPU, but
    for attention (+30%), as the CPU has a kernel of its own for that. None too where an operator lacks such a form.
    """
    if not _fits(2 * bytes_in(module.parameters()) + _SPARE_BYTES):
        with contextlib.suppress(Exception), _on_meta(module):
            return _measure(module, run, shape, dtype)
    return None


def _fits(size: int) -> bool:
    """Whether the limit on this process leaves `size` bytes; asked for, and not touched."""
    try:
        torch.empty(size, dtype=torch.uint8)
    except RuntimeError:
        return False
    return True


@contextmanager
def _on_meta(module: nn.Module) -> Iterator[None]:
    """Has `module` compute on the meta device, its evicted tensors replaced by ones of the same shape."""
    tables: list[dict[str, Any]] = [t for part in module.modules() for t in (part._parameters, part._buffers)]
    kept = [(table, dict(table)) for table in tables]
    meta: dict[int, Tensor] = {}
    for table, tensors in kept:
        for name, tensor in tensors.items():
            if tensor is not None:
                like = torch.empty(shape_of(tensor), dtype=tensor.dtype, device="meta")
                like = nn.Parameter(like, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else like
                table[name] = meta.setdefault(id(tensor), like)
    try:
        with torch.device("meta"):
            yield
    finally:
        for table, tensors in kept:
            table.update(tensors)


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
                if buffer.shape == kept.shape:  # else it was evicted, and an error left it filled
                    buffer.copy_(kept)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
