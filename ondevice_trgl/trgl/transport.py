"""The transport cost of a local module, computed inside its forward pass.

`with_transport` turns a module x -> out into x -> (out, cost), cost being the scalar sum over the module's blocks of
||r||^2 (arXiv 2309.17357, Eq. 10), without its weight 1 / (2 tau). The weights are shared, not copied.

mean: ||r||^2 is averaged over batch, channels and space (the authors' code). sum: summed over channels and space,
averaged over the batch (the paper's formula). tau_sum = tau_mean x C·H·W.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ondevice_trgl.model.inplace import changes_its_input, overwritten
from ondevice_trgl.model.partition import LocalModule, PlainGraphModule
from ondevice_trgl.model.residual import Residual


class _MeanSquare(torch.autograd.Function):
    """mean((a - b)^2), or mean(a^2) without b; keeps a and b themselves, not their difference."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, *([] if b is None else [b]))
        difference = a if b is None else a - b
        return difference.reshape(-1).dot(difference.reshape(-1)) / difference.numel()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, *rest = ctx.saved_tensors
        difference = a - rest[0] if rest else a.clone()
        difference *= 2.0 * grads[0] / difference.numel()
        minus = -difference if rest and ctx.needs_input_grad[1] else None
        return difference, minus


class _BranchOfSum(torch.autograd.Function):
    """mean(r^2) for out = shortcut + r; keeps shortcut and out, which the network keeps anyway, not r."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, shortcut: Tensor, out: Tensor) -> Tensor:
        ctx.save_for_backward(shortcut, out)
        return r.reshape(-1).dot(r.reshape(-1)) / r.numel()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        shortcut, out = ctx.saved_tensors
        difference = out - shortcut
        difference *= 2.0 * grads[0] / difference.numel()
        return difference, None, None


def square_of_norm(weight: Tensor, bias: Tensor) -> Tensor:
    """mean(r^2) of a branch that ends in BatchNorm, in train mode: mean over channels of gamma^2 + beta^2.

    Exact up to var / (var + eps). Needs no activation.
    """
    return (weight.square() + bias.square()).mean()


def square(r: Tensor) -> Tensor:
    """mean(r^2); keeps r."""
    result: Tensor = _MeanSquare.apply(r, None)  # type: ignore[no-untyped-call]
    return result


def square_of_branch(r: Tensor, shortcut: Tensor, out: Tensor) -> Tensor:
    """mean(r^2) for out = shortcut + r; keeps shortcut and out in place of r."""
    result: Tensor = _BranchOfSum.apply(r, shortcut.detach(), out.detach())  # type: ignore[no-untyped-call]
    return result


def square_of_difference(out: Tensor, into: Tensor) -> Tensor:
    """mean((out - into)^2); keeps both."""
    result: Tensor = _MeanSquare.apply(out, into)  # type: ignore[no-untyped-call]
    return result


def _per_sample(cost: Tensor, like: tuple[int, ...]) -> Tensor:
    size = 1
    for side in like:
        size *= side
    return cost * size


def has_transport(module: LocalModule, kind: str) -> bool:
    """Whether `kind` of transport cost applies anywhere in `module`."""
    return bool(_stretches(module) if kind == "displacement" or not module.branches else module.branches)


def _stretches(module: LocalModule) -> list[tuple[fx.Node, fx.Node]]:
    """Those that begin with an activation: ids are nothing that moves."""
    kept = []
    for into, out in module.stretches:
        dtype = into.meta.get("dtype", torch.float32)  # a boundary carries none, and is float32
        if dtype.is_floating_point:
            kept.append((into, out))
    return kept


def measured_pieces(module: LocalModule, pieces: Sequence[LocalModule], kind: str, norm: str) -> list[nn.Module]:
    """`pieces`, whose composition is `module`, their costs adding up to that of `with_transport(module, ...)`."""
    branches = kind == "branch" and bool(module.branches)
    return [
        with_transport(piece, kind, norm) if (piece.branches if branches else _stretches(piece)) else piece
        for piece in pieces
    ]


def with_transport(module: LocalModule, kind: str, norm: str) -> PlainGraphModule:
    """`module` with the output (out, cost). `kind` is branch or displacement, `norm` mean or sum.

    A module without a residual branch falls back to the displacement of its stretches that keep the shape.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, copies)
    terms: list[fx.Node] = []

    def add_term(function: Any, *operands: fx.Node, shape: tuple[int, ...]) -> None:
        term = graph.call_function(function, operands)
        if norm == "sum":
            with graph.inserting_after(term):
                term = graph.call_function(_per_sample, (term, shape))
        terms.append(term)

    if kind == "branch" and module.branches:
        for residual in module.branches:
            _add_branch(module, graph, copies, residual, add_term)
    else:
        for node in graph.nodes:
            _plain(node)
        for into, out in _stretches(module):
            _add_displacement(module, graph, copies[into], copies[out], tuple(out.meta["shape"][1:]), add_term)
    result = copies_of_output(module.graph, copies)
    if terms:
        total = terms[0]
        for term in terms[1:]:
            total = graph.call_function(operator.add, (total, term))
        graph.output((result, total))
    else:
        graph.output((result, None))
    measured = PlainGraphModule(module, graph, class_name="WithTransport")
    measured.kept = module.kept
    return measured


def copies_of_output(graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    result = output.args[0]
    assert isinstance(result, fx.Node)
    return copies[result]


def _add_branch(
    module: LocalModule, graph: fx.Graph, copies: dict[fx.Node, fx.Node], residual: Residual, add_term: Any
) -> None:
    add, branch, shortcut = copies[residual.add], copies[residual.branch], copies[residual.shortcut]
    shape = tuple(residual.add.meta["shape"][1:])
    if residual.norm is not None:
        with graph.inserting_before(add):
            gamma, beta = (graph.get_attr(f"{residual.norm}.{name}") for name in ("weight", "bias"))
            add_term(square_of_norm, gamma, beta, shape=shape)
        return
    modules = dict(module.named_modules())
    _plain(add)  # an add in place would overwrite what the cost is computed from
    if changes_its_input(add, modules) or overwritten(add, modules) or overwritten(shortcut, modules, add):
        with graph.inserting_before(add):
            kept = graph.call_method("clone", (branch,)) if overwritten(branch, modules) else branch
            add_term(square, kept, shape=shape)
        return
    with graph.inserting_after(add):
        add_term(square_of_branch, branch, shortcut, add, shape=shape)


def _add_displacement(
    module: LocalModule, graph: fx.Graph, into: fx.Node, out: fx.Node, shape: tuple[int, ...], add_term: Any
) -> None:
    modules = dict(module.named_modules())
    before, behind = into, out
    if overwritten(into, modules):
        with graph.inserting_after(into):
            before = graph.call_method("clone", (into,))
    if overwritten(out, modules):
        with graph.inserting_after(out):
            behind = graph.call_method("clone", (out,))
    with graph.inserting_after(behind):
        add_term(square_of_difference, behind, before, shape=shape)


def _plain(add: fx.Node) -> None:
    """Turn an add in place into one out of place, unless what it overwrites is looked at again."""
    into = add.args[0] if add.args else None
    if not isinstance(into, fx.Node) or any(add < user for user in into.users):
        return
    if add.target is operator.iadd:
        add.target = operator.add
    elif add.op == "call_method" and add.target == "add_":
        add.target = "add"
