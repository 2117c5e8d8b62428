"""Residual adds of a traced network: which operand is the branch, which the shortcut.

The branch r of `out = shortcut + r` carries the transport cost (arXiv 2309.17357, Eq. 10).
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from ondevice_trgl.model.store import shape_of

_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}


@dataclass(frozen=True)
class Residual:
    """One residual add of the graph."""

    add: fx.Node
    branch: fx.Node
    shortcut: fx.Node
    kind: str
    """identity | projection | resized (pooled or padded)"""
    norm: str | None
    """Layer name of the BatchNorm that the branch ends in: its cost needs no activation then."""


def find_residuals(graph: fx.Graph, model: nn.Module) -> list[Residual]:
    """Every residual add of `graph`, in order; the nodes must carry `meta["shape"]`.

    Of two operands with one origin, the branch is the deeper one: it has more weighted layers, one behind the other,
    since they parted. So a sum of parallel convolutions (MobileOne) is none. Nor is an add inside of another's branch
    that takes a part of what went into it (the groups of a Res2Net block): the block's own add has the whole branch.
    """
    modules = dict(model.named_modules())
    order = {node: i for i, node in enumerate(graph.nodes)}
    weighted = 0
    ancestors: dict[fx.Node, int] = {}  # as bit sets, each node among its own
    for node, i in order.items():
        bits = 1 << i
        for used in node.all_input_nodes:
            bits |= ancestors[used]
        ancestors[node] = bits
        if is_weighted(node, modules, model):
            weighted |= 1 << i
    nodes = list(order)
    found: list[tuple[Residual, int]] = []  # with what is in the branch alone
    for node in nodes:
        if node.op not in ("call_function", "call_method") or node.target not in _ADDS or len(node.args) != 2:
            continue
        if node.kwargs:  # `alpha` scales the branch: out - shortcut is not the operand then
            continue
        a, b = node.args[0], node.args[1]
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
            continue
        if "get_attr" in (a.op, b.op) or a.meta.get("shape") is None or a.meta.get("shape") != b.meta.get("shape"):
            continue
        if a is b or not ancestors[a] & ancestors[b]:
            continue
        only_a, only_b = ancestors[a] & ~ancestors[b], ancestors[b] & ~ancestors[a]
        depth_a, depth_b = _depth(nodes, only_a, weighted), _depth(nodes, only_b, weighted)
        if depth_a == depth_b:
            continue
        branch, shortcut, own, rest = (a, b, only_a, only_b) if depth_a > depth_b else (b, a, only_b, only_a)
        kind = "identity" if not rest else "projection" if rest & weighted else "resized"
        found.append((Residual(node, branch, shortcut, kind, _norm(branch, modules)), own))
    inside = {r.add for r, _ in found if r.kind == "resized" and any(own >> order[r.add] & 1 for _, own in found)}
    return [residual for residual, _ in found if residual.add not in inside]


def _depth(nodes: list[fx.Node], region: int, weighted: int) -> int:
    """Weighted nodes on the longest path inside `region`; both are bit sets of numbers in `nodes`."""
    depths: dict[fx.Node, int] = {}
    while region:
        lowest = region & -region
        node = nodes[lowest.bit_length() - 1]
        depths[node] = max((depths.get(used, 0) for used in node.all_input_nodes), default=0) + bool(lowest & weighted)
        region ^= lowest
    return max(depths.values(), default=0)


def is_weighted(node: fx.Node, modules: Mapping[str, nn.Module], model: nn.Module) -> bool:
    """Whether the node multiplies by a trained matrix or kernel (a norm's scale does not count)."""
    if node.op == "call_module":
        return any(len(shape_of(parameter)) >= 2 for parameter in modules[str(node.target)].parameters())
    for used in node.all_input_nodes:
        if used.op == "get_attr":
            value = operator.attrgetter(str(used.target))(model)
            if isinstance(value, nn.Parameter) and len(shape_of(value)) >= 2 and node.target not in _ADDS:
                return True
    return False


def _norm(branch: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    module = modules.get(str(branch.target)) if branch.op == "call_module" else None
    plain = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and module.affine
    return str(branch.target) if plain and len(branch.users) == 1 else None
