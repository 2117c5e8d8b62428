"""Which axis of an activation is channels, and which the batch, by the operators that made it.

A shape alone does not say: (16, 49) is channels by time behind a Conv1d and tokens by channels behind a Linear.
Convolutions and norms over channels have them on axis 1; linear layers, layer norms, attention and recurrent layers on
the last; between them axes are moved in known ways. Where nothing before a node tells, what reads it does.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ondevice_trgl.model.moves import Axes, moved, name_of

Shape = tuple[int, ...]

_NOWHERE: Axes = frozenset()
_FIRST = re.compile(r"(lazy)?(conv(transpose)?\dd|(batch|instance)norm(\dd)?|syncbatchnorm|groupnorm)")
_LAST = re.compile(
    r"(lazy|bi|nondynamicallyquantizable)?linear|embedding(bag)?|layernorm|rmsnorm|multiheadattention(forward)?"
    r"|transformer\w*|(rnn|lstm|gru)\w*"
)
_POOL = re.compile(r"(adaptive)?(avg|max|lp)pool\dd(withindices)?|fractionalmaxpool\dd")
_PRODUCTS = {"matmul", "bmm", "mm", "addmm"}
_MOST_AXES = 8
"""Of the tensors that a node gives several of."""


@dataclass(frozen=True)
class Layout:
    """Axes of a tensor, the batch counted as axis 0 where it comes first. None of a kind: it cannot be told.

    Several are one axis that was split: attention heads by their width, groups by their channels.
    """

    channels: Axes
    batch: Axes

    @property
    def rows_are_samples(self) -> bool:
        """Whether nothing says that axis 0 is another than the batch."""
        return not self.batch or 0 in self.batch

    def channel_axis(self, shape: Shape) -> int:
        """The axis of channels in `shape`, that of one sample. Where it cannot be told, by rank: (C, ...) or (T, C)."""
        axes = {axis - 1 for axis in self.channels if 0 < axis <= len(shape)}
        return max(axes) if axes else axis_by_rank(shape)


def axis_by_rank(shape: Shape) -> int:
    """The axis of channels in a sample (C, *space), (T, C) or (C,) of which only the shape is known."""
    return 1 if len(shape) == 2 else 0


def layouts_of(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[fx.Node, Layout]:
    """The layout of every node. Nodes carry `meta["shape"]`, batch first; `modules` are those of `call_module` by name.

    Reads types, arguments and shapes, and no tensor. Each node is looked at once forwards and once backwards.
    """
    look = _Look(graph, modules)
    made: dict[fx.Node, Axes] = {}
    batch: dict[fx.Node, Axes] = {}
    for node in graph.nodes:
        made[node] = look.made(node, made)
        batch[node] = frozenset({0}) if node.op == "placeholder" else look.followed(node, batch)
    channels: dict[fx.Node, Axes] = {}
    for node in reversed(graph.nodes):
        asked = look.asked(node, channels)
        channels[node] = made[node] & asked or made[node] or asked
    return {node: Layout(channels[node], batch[node]) for node in graph.nodes}


class _Look:
    """What a node says about channels; `axes` below are those of the nodes that were looked at before."""

    def __init__(self, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.names = {node: name_of(node, modules) for node in graph.nodes}
        self.constants: set[fx.Node] = set()
        """Parameters, and what is made of them alone."""
        for node in graph.nodes:
            if node.op == "get_attr" or (node.all_input_nodes and self.constants.issuperset(node.all_input_nodes)):
                self.constants.add(node)

    def made(self, node: fx.Node, axes: Mapping[fx.Node, Axes]) -> Axes:
        """Where the operators before `node`, and its own, have put channels."""
        if node in self.constants or node.op in ("placeholder", "output"):
            return _NOWHERE
        inputs = [used.meta["shape"] for used in node.all_input_nodes if "shape" in used.meta]
        rank = len(node.meta.get("shape") or (inputs[0] if inputs else ()))  # recurrent layers give a tuple
        said = self._said(node, rank)
        return said or self.followed(node, axes) or self._pooled(node, rank)

    def followed(self, node: fx.Node, axes: Mapping[fx.Node, Axes]) -> Axes:
        """Axes of the inputs, moved as `node` moves them. Of inputs that disagree the earliest counts: the shortcut."""
        inputs = sorted(node.all_input_nodes, key=lambda used: self.order[used])
        found = [moved(node, used, axes[used], self.modules) for used in inputs if used not in self.constants]
        if self.names[node] in _PRODUCTS:
            return _NOWHERE.union(*found)
        return next((one for one in found if one), _NOWHERE)

    def asked(self, node: fx.Node, axes: Mapping[fx.Node, Axes]) -> Axes:
        """Where the first reader of `node` that tells has channels."""
        if node in self.constants:
            return _NOWHERE
        rank = len(node.meta.get("shape", range(_MOST_AXES)))
        for user in sorted(node.users, key=lambda user: self.order[user]):
            if user.op == "output":
                continue
            told = _NOWHERE
            if user.all_input_nodes[0] is node or self.names[user].startswith("multihead"):
                told = self._said(user, rank) or self._pooled(user, rank)
            if not told and not self._said(user, len(user.meta.get("shape", ()))):
                into = axes[user]
                told = frozenset(a for a in range(rank) if moved(user, node, frozenset({a}), self.modules) & into)
            if told:
                return told
        return _NOWHERE

    def _said(self, node: fx.Node, rank: int) -> Axes:
        """The axis that the operator of `node` itself has channels on, in a tensor of `rank` axes."""
        name = self.names[node]
        if rank >= 2 and _FIRST.fullmatch(name) and (not name.startswith("conv") or _fits(name, rank)):
            return frozenset({1})
        if _LAST.fullmatch(name) and (name not in ("layernorm", "rmsnorm") or self._over_last(node)):
            return frozenset({rank - 1})
        if name in _PRODUCTS and len(node.args) >= 2 and node.args[-1] in self.constants:
            return frozenset({rank - 1})
        return _NOWHERE

    def _pooled(self, node: fx.Node, rank: int) -> Axes:
        """Pooling leaves channels where they are: axis 1, where nothing else tells."""
        name = self.names[node]
        return frozenset({1}) if _POOL.fullmatch(name) and _fits(name, rank) else _NOWHERE

    def _over_last(self, node: fx.Node) -> bool:
        """Whether a norm is over the last axis alone. A subclass of nn.LayerNorm may permute before and behind."""
        over: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape", ())
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if not type(module).__module__.startswith("torch.nn."):
                return False
            over = getattr(module, "normalized_shape", ())
        return isinstance(over, list | tuple) and len(over) == 1


def _fits(name: str, rank: int) -> bool:
    """Whether a tensor of `rank` axes has batch, channels and the `\\dd` axes that the operator works on."""
    dims = re.search(r"(\d)d", name)
    return dims is not None and rank == int(dims[1]) + 2
