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

    Of two operands with one origin, the branch is the one with more weighted layers since they parted.
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
    found = []
    for node in graph.nodes:
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
        weight_a, weight_b = (only_a & weighted).bit_count(), (only_b & weighted).bit_count()
        if weight_a == weight_b:
            continue
        branch, shortcut, rest = (a, b, only_b) if weight_a > weight_b else (b, a, only_a)
        kind = "identity" if not rest else "projection" if rest & weighted else "resized"
        found.append(Residual(node, branch, shortcut, kind, _norm(branch, modules)))
    return found


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
