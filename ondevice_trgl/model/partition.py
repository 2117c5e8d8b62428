"""nn.Module -> Partition: an ordered chain of local modules whose composition is the network."""

import keyword
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode

from ondevice_trgl.errors import PartitionError
from ondevice_trgl.model.bounds import even_bounds, named_bounds
from ondevice_trgl.model.proof import prove
from ondevice_trgl.model.residual import Residual
from ondevice_trgl.model.store import MARK, NET, parameter_count
from ondevice_trgl.model.trace import Chain, Segment, Shape, cuts_off, trace


class PlainGraphModule(fx.GraphModule):
    """A graph module of a network's layers, whose errors pass as they are.

    torch.fx would print each to stderr, and to do so import torch._dynamo: 73 MB, just when memory was refused.
    """

    kept: tuple[tuple[nn.Module, bool], ...] = ()
    """Layers that keep to one mode, train or eval, and which it is."""

    def train(self, mode: bool = True) -> Self:
        """Train or eval mode, but for the layers that keep to one."""
        super().train(mode)
        for layer, kept in self.kept:
            layer.training = kept
        return self

    def recompile(self) -> PythonCode:
        code = super().recompile()
        setattr(type(self), "__call__", nn.Module.__call__)  # noqa: B010 -- each graph module has a class of its own
        return code


class LocalModule(PlainGraphModule):
    """Consecutive segments of a network as one module (B, *in_shape) -> (B, *out_shape).

    Shares the network's parameters and buffers, under their own names behind "net.".
    """

    label: str
    in_shape: Shape
    out_shape: Shape
    channel_axis: int
    """Of `out_shape`, and `head_limit`: as the last segment has them."""
    head_limit: int
    frozen: bool
    """Whether it has parameters and trains none: `requires_grad` is off, or forward uses them without gradients."""
    passed: bool
    """It is part of the frozen front: passed through, with no auxiliary head behind it."""
    branches: tuple[Residual, ...]
    """Residual adds inside, their nodes being those of `self.graph`."""
    stretches: tuple[tuple[fx.Node, fx.Node], ...]
    """(input, output) node of every segment that keeps its shape: what displacement is measured on."""

    @classmethod
    def of(cls, chain: Chain, start: int, stop: int) -> "LocalModule":
        """Segments `start` to `stop` (exclusive) of `chain`."""
        segments = chain.segments[start:stop]
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        held: dict[str, Any] = {"training": True}

        def copied(node: fx.Node) -> fx.Node:
            copy = copies[node] = graph.node_copy(node, copy_of)
            if node.op == "call_module" or (node.op == "get_attr" and node.target != "training"):
                copy.target = _inside(str(node.target))
                held[copy.target] = operator.attrgetter(str(node.target))(chain.root)
            return copy

        def copy_of(node: fx.Node) -> fx.Node:
            return copied(node) if node not in copies and node in chain.fetched else copies[node]

        nodes = [node for segment in segments for node in segment.nodes]
        if start:
            before = chain.segments[start - 1]
            boundary = copies[before.output] = graph.placeholder("boundary")
            copies[chain.segments[0].nodes[0]] = boundary  # whose batch size and device it has
            in_shape = before.out_shape
        else:
            in_shape = chain.in_shape
        entry: fx.Node | None = copies[chain.segments[start - 1].output] if start else None
        stretches = []
        for segment in segments:
            for node in segment.nodes:
                copied(node)
                if node.op == "placeholder":
                    entry = copies[node]
            shape_in = chain.segments[segment.index - 1].out_shape if segment.index else chain.in_shape
            if entry is not None and shape_in == segment.out_shape:
                stretches.append((entry, copies[segment.output]))
            entry = copies[segment.output]
        graph.output(copies[nodes[-1]])
        module = cls(held, graph, class_name="LocalModule")
        inside = {id(layer) for layer in module.modules()}
        layers = ((layer, chain.modes.kept.get(path)) for path, layer in chain.root.named_modules())
        module.kept = tuple((layer, mode) for layer, mode in layers if mode is not None and id(layer) in inside)
        module.label = _label(segments)
        module.in_shape, module.out_shape = in_shape, segments[-1].out_shape
        module.channel_axis, module.head_limit = segments[-1].channel_axis, segments[-1].head_limit
        module.branches = tuple(
            Residual(copies[r.add], copies[r.branch], copies[r.shortcut], r.kind, _closed_form(r, chain))
            for segment in segments
            for r in segment.residuals
            if r.branch in copies and r.shortcut in copies
        )
        module.stretches = tuple(stretches)
        trains = segments[-1].output in chain.learning and _learns(module)
        module.passed = stop <= chain.prefix
        module.frozen = module.passed or (next(module.parameters(), None) is not None and not trains)
        return module


def _closed_form(residual: Residual, chain: Chain) -> str | None:
    """Its norm, as the local module names it, where that normalises by the batch: else its output has any size."""
    if residual.norm is None or chain.modes.kept.get(residual.norm) is False:
        return None
    return _inside(residual.norm)


def _learns(module: LocalModule) -> bool:
    """Whether the output has a gradient, where the input has none."""
    layers = dict(module.named_modules())
    with_gradient: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "call_module":
            own = any(parameter.requires_grad for parameter in layers[str(node.target)].parameters())
        elif node.op == "get_attr" and node.target != "training":
            own = bool(operator.attrgetter(str(node.target))(module).requires_grad)
        else:
            own = False
        if not cuts_off(node) and (own or any(before in with_gradient for before in node.all_input_nodes)):
            with_gradient.add(node)
    return any(node.op == "output" and node in with_gradient for node in module.graph.nodes)


def _inside(path: str) -> str:
    """The name by which a local module holds the network's `path`; of `own_names` the inverse."""
    return ".".join([NET, *(f"{part}{MARK}" if keyword.iskeyword(part) else part for part in path.split("."))])


def _label(segments: Sequence[Segment]) -> str:
    first, last = segments[0].name, segments[-1].name
    return first if first == last else f"{first.split('..')[0]}..{last.split('..')[-1]}"


@dataclass(frozen=True)
class Partition:
    """Local modules in order; `bounds[k]` is the segment at which module k starts, the last entry the segment count."""

    chain: Chain
    bounds: tuple[int, ...]
    modules: tuple[LocalModule, ...]

    def pieces(self, index: int) -> tuple[LocalModule, ...]:
        """The segments of module `index`, each as a module of its own that shares its weights."""
        start, stop = self.bounds[index], self.bounds[index + 1]
        return tuple(LocalModule.of(self.chain, k, k + 1) for k in range(start, stop))

    def to_dict(self) -> dict[str, Any]:
        """Names, shapes and residual branches of the modules, JSON-ready."""
        return {
            "bounds": list(self.bounds),
            "modules": [
                {
                    "name": module.label,
                    "in_shape": list(module.in_shape),
                    "out_shape": list(module.out_shape),
                    "params": parameter_count(module),
                    "branches": [{"branch": r.branch.name, "shortcut": r.kind} for r in module.branches],
                }
                for module in self.modules
            ],
        }


def group(chain: Chain, bounds: Sequence[int]) -> Partition:
    """The partition whose module k holds segments bounds[k] to bounds[k + 1] (exclusive).

    Raises PartitionError for a graph that cannot be written as code: that of a blueprint may be anything.
    """
    try:
        modules = tuple(LocalModule.of(chain, a, b) for a, b in pairwise(bounds))
    except SyntaxError as error:
        raise PartitionError(f"the network's graph is no code: {error.msg}", hint="its blueprint is damaged") from error
    return Partition(chain=chain, bounds=tuple(bounds), modules=modules)


def segments_of(chain: Chain) -> list[LocalModule]:
    """Each segment of `chain` as a module of its own."""
    return [LocalModule.of(chain, index, index + 1) for index in range(len(chain.segments))]


def partition(model: nn.Module, example_input: Tensor, modules: str | int | Sequence[str] = "auto") -> Partition:
    """Cut `model` into local modules that share its parameters and whose composition equals it.

    `modules` is a number, the names of the layers that each module but the last ends with, or "auto": one module for
    each block. A number balances parameters and activations. The composition is proved to be the model, by a forward
    and backward pass of each on a few samples. Raises PartitionError.
    """
    chain = trace(model, example_input)
    prove(chain, segments_of(chain), example_input)
    if isinstance(modules, int):
        return group(chain, even_bounds(chain, modules))
    if isinstance(modules, str):
        if modules != "auto":
            raise PartitionError(f"modules = {modules!r}", hint="give 'auto', a number, or a list of layer names")
        return group(chain, range(len(chain.segments) + 1))
    return group(chain, named_bounds(chain, modules))
