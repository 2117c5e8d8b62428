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
from ondevice_trgl.trgl.moved import moved, share_of, squared, start


class _MeanSquare(torch.autograd.Function):
    """mean((a - b)^2), or mean(a^2) without b; keeps a and b themselves, not their difference."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, *([] if b is None else [b]))
        difference = a if b is None else a - b
        return squared(difference) / difference.numel()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, *rest = ctx.saved_tensors
        difference = a - rest[0] if rest else a.clone()
        difference *= 2.0 * grads[0] / difference.numel()
        minus = -difference if rest and ctx.needs_input_grad[1] else None
        return difference, minus


class _Sum(torch.autograd.Function):
    """(shortcut + r, mean(r^2)); keeps shortcut and sum, which the network keeps anyway, not r.

    The gradient of the cost is added on the way from the sum to r: no tensor of its own, and one pass over memory less.
    """

    @staticmethod
    def forward(ctx: Any, r: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        out = shortcut + r
        ctx.save_for_backward(shortcut, out)
        return out, squared(r) / r.numel()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        grad, grad_cost = grads
        if grad_cost is None:
            return grad, grad
        shortcut, out = ctx.saved_tensors
        scale = share_of(grad_cost, out)
        total = out * scale if grad is None else torch.add(grad, out, alpha=scale)
        return total.sub_(shortcut, alpha=scale), grad


def square_of_norm(weight: Tensor, bias: Tensor) -> Tensor:
    """mean(r^2) of a branch that ends in BatchNorm, in train mode: mean over channels of gamma^2 + beta^2.

    Exact up to var / (var + eps). Needs no activation.
    """
    return (weight.square() + bias.square()).mean()


def square(r: Tensor) -> Tensor:
    """mean(r^2); keeps r."""
    result: Tensor = _MeanSquare.apply(r, None)  # type: ignore[no-untyped-call]
    return result


def sum_with_square(r: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor]:
    """(shortcut + r, mean(r^2)); keeps shortcut and sum in place of r."""
    result: tuple[Tensor, Tensor] = _Sum.apply(r, shortcut)  # type: ignore[no-untyped-call]
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

    def add_term(function: Any, *operands: fx.Node | int, shape: tuple[int, ...]) -> None:
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
        _add_displacements(module, graph, copies, add_term)
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
    with graph.inserting_before(add):
        both = graph.call_function(sum_with_square, (branch, shortcut))
        out = graph.call_function(operator.getitem, (both, 0))
        add_term(operator.getitem, both, 1, shape=shape)
    add.replace_all_uses_with(out)
    graph.erase_node(add)
    copies[residual.add] = out


def _add_displacements(module: LocalModule, graph: fx.Graph, copies: dict[fx.Node, fx.Node], add_term: Any) -> None:
    """Of every stretch; `copies` then leads to what the network goes on with."""
    modules = dict(module.named_modules())
    placed: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    """Original node -> its activation and link in `graph`."""
    plain = {residual.add: residual for residual in module.branches}
    lost = {node for stretch in _stretches(module) for node in stretch if overwritten(copies[node], modules)}
    for into, out in _stretches(module):
        shape = tuple(out.meta["shape"][1:])
        if (
            out in plain and _source(plain[out].shortcut, modules) is into
        ):  # what moved it is the branch, and nothing else
            _add_branch(module, graph, copies, plain[out], add_term)
            continue
        if into in lost or out in lost or out in placed:
            _add_difference(graph, copies[into], copies[out], lost, (into, out), shape, add_term)
            continue
        if into not in placed:
            (link,) = _split(graph, copies, into, start)
            placed[into] = copies[into], link
        before, link = placed[into]
        cost, link = _split(graph, copies, out, moved, before, link)
        with graph.inserting_after(link):
            add_term(operator.pos, cost, shape=shape)
        placed[out] = copies[out], link


def _source(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    """What `node` is, or passes on as it is."""
    while node.op == "call_module" and isinstance(modules.get(str(node.target)), nn.Identity):
        (node,) = node.all_input_nodes
    return node


def _split(
    graph: fx.Graph, copies: dict[fx.Node, fx.Node], node: fx.Node, function: Any, *more: fx.Node
) -> list[fx.Node]:
    """Put `function(node, *more)` behind `node`: its first result in place of that, its others are returned."""
    before = copies[node]
    with graph.inserting_after(before):
        both = graph.call_function(function, (before, *more))
    count = 3 if more else 2
    results, last = [], both
    for number in range(count):
        with graph.inserting_after(last):
            last = graph.call_function(operator.getitem, (both, number))
        results.append(last)
    before.replace_all_uses_with(results[0], delete_user_cb=lambda user: user is not both)
    copies[node] = results[0]
    return results[1:]


def _add_difference(
    graph: fx.Graph,
    before: fx.Node,
    behind: fx.Node,
    lost: set[fx.Node],
    ends: tuple[fx.Node, fx.Node],
    shape: tuple[int, ...],
    add_term: Any,
) -> None:
    """The cost of one stretch as a term of its own; of an end that is overwritten a copy is kept."""
    if ends[0] in lost:
        with graph.inserting_after(before):
            before = graph.call_method("clone", (before,))
    if ends[1] in lost:
        with graph.inserting_after(behind):
            behind = graph.call_method("clone", (behind,))
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
