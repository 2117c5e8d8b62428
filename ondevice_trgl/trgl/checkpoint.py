"""Activation checkpointing: keep a piece's input alone, and compute its activations again when backward gets there.

`torch.utils.checkpoint` does this too, but its first call imports torch._dynamo (+78 MB), and its second forward pass
moves BatchNorm's running statistics twice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from ondevice_trgl.device.randomness import Randomness
from ondevice_trgl.model.inplace import overwritten
from ondevice_trgl.model.store import tensors_of
from ondevice_trgl.trgl.precision import InPrecision


class _Start(torch.autograd.Function):
    """A scalar whose gradient with respect to `out` is `grad`.

    `torch.autograd.grad(out, ..., grad)` would do, but with a gradient given it imports sympy (+34 MB).
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.grad, None


def _start(out: Tensor, grad: Tensor) -> Tensor:
    result: Tensor = _Start.apply(out, grad)  # type: ignore[no-untyped-call]
    return result


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor | tuple[Tensor, ...]:
        ctx.piece, ctx.random = piece, Randomness.now(x.device)
        ctx.save_for_backward(x)
        version = x._version
        before = [(tensor, tensor.clone()) for tensor in _moving(piece)]
        out: Tensor | tuple[Tensor, ...] = _call(piece, x)
        if x._version != version:
            raise RuntimeError(f"{type(piece).__name__} changes its input in place: it cannot be computed again")
        ctx.before = [(tensor, value) for tensor, value in before if not torch.equal(tensor, value)]
        if piece not in _MOVING:
            _MOVING[piece] = [tensor for tensor, _ in ctx.before]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[1])
        parameters = [p for p in ctx.piece.parameters() if p.requires_grad]
        now = Randomness.now(x.device)
        ctx.random.restore(x.device)
        try:
            with torch.enable_grad(), _statistics_once(ctx.piece), _as_before(ctx.before):
                out = _call(ctx.piece, x)
                outs = out if isinstance(out, tuple) else (out,)
                start = torch.stack([_start(o, grad) for o, grad in zip(outs, grads, strict=True)]).sum()
                del out, outs  # what backward needs it keeps
        finally:
            now.restore(x.device)
        wanted = [x, *parameters] if x.requires_grad else parameters
        found = torch.autograd.grad(start, wanted, allow_unused=True)
        return None, *(found if x.requires_grad else (None, *found))


def _call(piece: nn.Module, x: Tensor) -> Any:
    """`piece` on `x`; on a copy where a graph's first layers would overwrite it."""
    inner = piece.part if isinstance(piece, InPrecision) else piece
    if isinstance(inner, fx.GraphModule):
        start = next(node for node in inner.graph.nodes if node.op == "placeholder")
        if overwritten(start, dict(inner.named_modules())):
            return piece(x.clone())
    return piece(x)


@contextmanager
def _statistics_once(piece: nn.Module) -> Iterator[None]:
    """BatchNorm without its running statistics: the first pass has moved them already."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    norms = [m for m in piece.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    kept = [(norm, name, norm._buffers[name]) for norm in norms for name in names]
    for norm, name, _ in kept:
        norm._buffers[name] = None
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            norm._buffers[name] = buffer


_MOVING: WeakKeyDictionary[nn.Module, list[Tensor]] = WeakKeyDictionary()
"""By piece: the tensors beside BatchNorm's that its forward pass was seen to change."""


def _moving(piece: nn.Module) -> list[Tensor]:
    """Tensors that a forward pass changes; before the first one, all that it might."""
    if piece in _MOVING:
        return _MOVING[piece]
    norms = [layer for layer in piece.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    theirs = {id(buffer) for norm in norms for buffer in norm.buffers()}
    return [t for _, t in tensors_of(piece) if not isinstance(t, nn.Parameter) and id(t) not in theirs]


@contextmanager
def _as_before(values: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Tensors as they were before the first pass, and afterwards as that left them."""
    after = [(tensor, tensor.clone()) for tensor, _ in values]
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in after:
                tensor.copy_(value)


def checkpointed(pieces: Sequence[nn.Module]) -> Callable[[Tensor], Any]:
    """The composition of `pieces`, each of which keeps its input alone between forward and backward.

    A piece may return (output, cost), as `with_transport` makes it do: then the composition returns (output, sum of the
    costs). Gradients equal those of the plain composition. Every piece runs twice; memory is the inputs of all pieces
    and the activations of one. Draws of the global CPU generator (dropout) are the same in both passes. Raises
    RuntimeError for a piece that changes its input in place.
    """

    def forward(x: Tensor) -> Any:
        total: Tensor | None = None
        for piece in pieces:
            out = _Recomputed.apply(piece, x, *(p for p in piece.parameters() if p.requires_grad))  # type: ignore[no-untyped-call]
            if isinstance(out, tuple):
                out, cost = out
                total = cost if total is None else total + cost
            x = out
        return x if total is None else (x, total)

    return forward
