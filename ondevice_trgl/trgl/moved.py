"""How far blocks move activations, at no memory of its own: the displacement costs of a chain of blocks.

The gradient of the costs at an activation z between two blocks, c (z - before) - c' (behind - z), is added in one go to
the gradient that comes from the network anyway, when that passes z. As separate terms of the loss they would hold two
tensors of that size each at the highest point of the backward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20
"""Of a difference that are there at a time."""


@dataclass
class Link:
    """What an activation has to know, in the backward pass, of the block behind it."""

    behind: Tensor | None = None
    version: int = 0
    scale: float = 0.0
    """Gradient of the loss with respect to the cost of that block, times 2 / elements."""


class _Place(torch.autograd.Function):
    """(z, mean((z - before)^2)), with the gradients of the costs before and behind z added to that of z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, before: Tensor | None, link_before: Link | None, link: Link) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, *([] if before is None else [before]))
        ctx.link_before, ctx.link = link_before, link
        return z, None if before is None else _mean_square(z, before)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        z, *rest = ctx.saved_tensors
        link, grad, grad_cost = ctx.link, grads[0], grads[1]
        scale = 0.0
        if rest and grad_cost is not None:
            scale = share_of(grad_cost, z)
            if ctx.link_before is not None:
                ctx.link_before.scale = scale
        terms = [(z, scale + link.scale)] + [(before, -scale) for before in rest]
        if link.behind is not None:
            if link.behind._version != link.version:
                raise RuntimeError("an activation that the transport cost is measured from was changed in place")
            terms.append((link.behind, -link.scale))
        link.behind = None
        return _sum(grad, terms), None, None, None


def share_of(grad_cost: Tensor, like: Tensor) -> float:
    """What mean(d^2) adds to the gradient of d, over d, a tensor as large as `like`; 1 on the meta device."""
    return 1.0 if grad_cost.is_meta else 2.0 * float(grad_cost) / like.numel()


def squared(r: Tensor) -> Tensor:
    """Sum of squares, added up in float32 where `r` is in half precision."""
    flat = r.reshape(-1)
    return torch.linalg.vector_norm(flat, dtype=torch.float32).square() if r.dtype == torch.bfloat16 else flat.dot(flat)


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    if not (a.is_contiguous() and b.is_contiguous()):
        return squared(a - b) / a.numel()
    parts = []
    for x, y in zip(a.view(-1).split(_CHUNK_ELEMENTS), b.view(-1).split(_CHUNK_ELEMENTS), strict=True):
        parts.append(squared(x - y))
    return (parts[0] if len(parts) == 1 else torch.stack(parts).sum()) / a.numel()


def _sum(grad: Tensor | None, terms: list[tuple[Tensor, float]]) -> Tensor:
    """`grad` and the sum of the terms, each a tensor and its factor, in new memory: others may hold `grad` too."""
    (first, factor), *rest = terms
    total = first * factor if grad is None else torch.add(grad, first, alpha=factor)
    for tensor, factor in rest:
        total.add_(tensor, alpha=factor)
    return total


def start(z: Tensor) -> tuple[Tensor, Link]:
    """z where a block begins that none ended at, and its link."""
    link = Link()
    return _Place.apply(z, None, None, link)[0], link  # type: ignore[no-untyped-call]


def moved(z: Tensor, before: Tensor, link_before: Link) -> tuple[Tensor, Tensor, Link]:
    """z, mean((z - before)^2) and the link of z, which a block ends in that began at `before`.

    The network must go on with the z that is returned, and with the `before` that came with its link. Memory: four
    megabytes for a moment; z, `before` and what is behind z are kept until the backward pass comes to z.
    """
    link = Link()
    if torch.is_grad_enabled():
        link_before.behind, link_before.version = z.detach(), z._version
    out, cost = _Place.apply(z, before, link_before, link)  # type: ignore[no-untyped-call]
    return out, cost, link
