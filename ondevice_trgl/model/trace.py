"""A network as a chain of segments: its graph cut wherever exactly one tensor crosses."""

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ondevice_trgl.errors import PartitionError
from ondevice_trgl.model.fetched import fetched, uses
from ondevice_trgl.model.graph import graph_of
from ondevice_trgl.model.heads import head_limit
from ondevice_trgl.model.inplace import writers
from ondevice_trgl.model.layout import layouts_of
from ondevice_trgl.model.modes import Modes
from ondevice_trgl.model.passes import BATCHES
from ondevice_trgl.model.residual import Residual, find_residuals, is_weighted
from ondevice_trgl.model.unwrap import check_tensors, unwrapped

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """The smallest piece that can be a local module: the nodes between two neighbouring cuts.

    `ends` are the layer names that end here, by which a user may ask for this cut.
    """

    index: int
    name: str
    ends: tuple[str, ...]
    nodes: tuple[fx.Node, ...]
    output: fx.Node
    out_shape: Shape
    """Without the batch dimension."""
    channel_axis: int
    """Of `out_shape`: 0 for (C, H, W), 1 for (T, C)."""
    head_limit: int
    """Parameters that a head behind it may have."""
    residuals: tuple[Residual, ...]


@dataclass(frozen=True)
class Chain:
    """A traced network: `segments` composed in order are the network."""

    model: nn.Module
    """The user's own, or what a blueprint says."""
    root: nn.Module
    """What the graph's targets name: the layers and tensors of `model`, and constants that `forward` uses."""
    graph: fx.Graph
    fetched: frozenset[fx.Node]
    """Nodes that every segment computes for itself where it uses them."""
    learning: frozenset[fx.Node]
    """Nodes to which the gradient of the network's output comes: it is cut off from the others on its way."""
    modes: Modes
    in_shape: Shape
    """Of one sample."""
    in_dtype: torch.dtype
    num_outputs: int
    """Width of the network's output: classes."""
    segments: tuple[Segment, ...]
    trunk: int
    """How many segments come before the network's own classifier; all, where that is part of the last."""
    prefix: int = 0
    """How many come first that are passed through and never trained: no auxiliary head stands behind them."""


def trace(model: nn.Module, example_input: Tensor, *, apart: bool = False, freeze_norms: bool = False) -> Chain:
    """The chain of `model`. `example_input` is a batch (B, ...) of at least one sample; B is not baked in.

    The classifier, which is the last layer with weights, belongs to the last segment; `apart`, it is one of its own.
    With `freeze_norms`, norms that have running statistics stay in eval mode.

    Runs forward passes without a backward pass, and leaves the model as it was. Memory: that of a forward pass of three
    samples. Raises PartitionError where the network cannot be traced, takes or returns something other than one
    tensor, or does not accept the input.
    """
    model = unwrapped(model, example_input)
    check_tensors(model)
    modes = Modes.of(model, freeze_norms=freeze_norms)
    traced = graph_of(model, example_input, modes)
    result = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    if len(result.meta["shape"]) != 2:
        raise PartitionError(
            f"{type(model).__name__} returns a tensor of shape {result.meta['shape']}, expected (batch, classes)",
            hint="wrap the network so that it returns one row of logits, or of numbers, for each sample"
            + ("; where that is one number, (batch, 1): leave squeeze out" if len(result.meta["shape"]) == 1 else ""),
        )
    root = _root(model, traced.constants)
    shape, dtype = tuple(example_input.shape[1:]), example_input.dtype
    return chain_from(model, root, traced.graph, modes, shape, dtype, apart=apart)


def _root(model: nn.Module, constants: Mapping[str, Tensor]) -> nn.Module:
    """A module that holds what `model` holds, the very same objects, and the constants beside it."""
    root = nn.Module()
    for table in ("_parameters", "_buffers", "_modules"):
        root.__dict__[table] = model.__dict__[table]
    own = {name: value for name, value in model.__dict__.items() if isinstance(value, Tensor)}
    root.__dict__.update(own | dict(constants))
    return root


def chain_from(
    model: nn.Module,
    root: nn.Module,
    graph: fx.Graph,
    modes: Modes,
    in_shape: Shape,
    in_dtype: torch.dtype,
    names: list[tuple[str, tuple[str, ...]]] | None = None,
    *,
    apart: bool = False,
) -> Chain:
    """The chain of a graph whose nodes carry shapes. `names` are names and ends of the segments, where they are known.

    No tensor of `model` is read, only shapes.
    """
    modules = dict(root.named_modules())
    everywhere = fetched(graph, modules)
    segments = tuple(_segments(root, modules, graph, everywhere, apart=apart))
    trunk = len(segments) - (apart and len(segments) > 1)
    if names is not None:
        pairs = zip(segments, names, strict=True)
        segments = tuple(dataclasses.replace(segment, name=name, ends=ends) for segment, (name, ends) in pairs)
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    assert isinstance(result, fx.Node)
    width = int(result.meta["shape"][1])
    learning = frozenset(_learning(result))
    return Chain(model, root, graph, frozenset(everywhere), learning, modes, in_shape, in_dtype, width, segments, trunk)


def _learning(output: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [output]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if cuts_off(node) else node.all_input_nodes
    return found


def cuts_off(node: fx.Node) -> bool:
    """Whether no gradient comes through `node`."""
    return node.target == "detach" or (node.target is getattr and node.args[1] == "data")


def _segments(
    root: nn.Module,
    modules: Mapping[str, nn.Module],
    graph: fx.Graph,
    everywhere: set[fx.Node],
    *,
    apart: bool,
) -> Iterator[Segment]:
    nodes = [node for node in graph.nodes if node.op != "output" and node not in everywhere]
    layouts = layouts_of(graph, dict(modules))
    cuts = [i for i in _cuts(root, modules, graph, nodes, everywhere) if layouts[nodes[i]].rows_are_samples]
    pieces = _merge(
        _split(nodes, cuts), lambda piece: any(is_weighted(node, modules, root) for node in piece), apart=apart
    )
    residuals = find_residuals(graph, root)
    names = [_name(piece) for piece in pieces]
    for index, piece in enumerate(pieces):
        inside = set(piece)
        later = {path for rest in pieces[index + 1 :] for node in rest for path in layer_paths(node)}
        yield Segment(
            index=index,
            name=names[index] if names.count(names[index]) == 1 else _span(piece),
            ends=tuple(path for path in layer_paths(piece[-1]) if path not in later),
            nodes=tuple(piece),
            output=piece[-1],
            out_shape=(shape := piece[-1].meta["shape"][1:]),
            channel_axis=layouts[piece[-1]].channel_axis(shape),
            head_limit=head_limit(root, piece),
            residuals=tuple(r for r in residuals if r.add in inside),
        )


def _cuts(
    root: nn.Module,
    modules: Mapping[str, nn.Module],
    graph: fx.Graph,
    nodes: list[fx.Node],
    everywhere: set[fx.Node],
) -> list[int]:
    """Indices i such that one floating-point tensor (batch, ...) alone crosses from nodes[:i + 1] to the rest."""
    position = {node: i for i, node in enumerate(nodes)}
    reach = [0] * len(nodes)  # how many values are alive behind node i
    for i, node in enumerate(nodes):
        last = max((position.get(user, len(nodes)) for user in node.users if user not in everywhere), default=i)
        for j in range(i, min(last, len(nodes))):
            reach[j] += 1
    for first, last in _shared_spans(root, modules, graph, position, everywhere):
        for j in range(first, last):
            reach[j] += 2  # a parameter in two places keeps both in one module
    return [
        i
        for i, node in enumerate(nodes[:-1])
        if reach[i] == 1
        and node.op != "placeholder"
        and _is_rows(node)  # a sequence-first layout has other rows
        and len(node.meta["shape"]) >= 2
        and node.meta["dtype"].is_floating_point
        and any(position.get(user, -1) > i for user in node.users)
    ]


def _is_rows(node: fx.Node) -> bool:
    """Whether the value of `node` is a tensor with a row for each sample."""
    return bool(node.meta.get("rows", node.meta.get("shape", ())[:1] == BATCHES[:1]))


def _shared_spans(
    root: nn.Module,
    modules: Mapping[str, nn.Module],
    graph: fx.Graph,
    position: dict[fx.Node, int],
    everywhere: set[fx.Node],
) -> Iterator[tuple[int, int]]:
    """For each parameter, and each buffer that changes, that is used more than once: the first and the last place."""
    places: dict[int, list[int]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            layer = modules[str(node.target)]
            for tensor in (*layer.parameters(), *layer.buffers()):
                places.setdefault(id(tensor), []).append(position[node])
        elif node.op == "get_attr" and node.target != "training":
            value = operator.attrgetter(str(node.target))(root)
            used = [position[user] for user in uses(node, everywhere) if user in position]
            if isinstance(value, nn.Parameter) or next(writers(node, modules), None) is not None:
                places.setdefault(id(value), []).extend(used)
    for used in places.values():
        if used and min(used) != max(used):
            yield min(used), max(used)


def _split(nodes: list[fx.Node], cuts: list[int]) -> list[list[fx.Node]]:
    starts = [0, *(cut + 1 for cut in cuts)]
    return [nodes[start:stop] for start, stop in zip(starts, [*starts[1:], len(nodes)], strict=True)]


def _merge(pieces: list[list[fx.Node]], weighted: Any, *, apart: bool) -> list[list[fx.Node]]:
    """Joins pieces that have nothing to train with the one before and, unless `apart`, the classifier with the last."""
    merged: list[list[list[fx.Node]]] = [[]]
    for piece in pieces:
        if weighted(piece) and any(weighted(part) for part in merged[-1]):
            merged.append([piece])
        else:
            merged[-1].append(piece)
    if len(merged) > 1 and apart:
        _pools_with_the_last(merged, weighted)
    elif len(merged) > 1:
        merged[-2].extend(merged.pop())
    return [[node for part in parts for node in part] for parts in merged]


def _pools_with_the_last(pieces: list[list[list[fx.Node]]], weighted: Any) -> None:
    """Moves pooling from the end of the last piece but one to the last, in place.

    A head in its place then sees what the layers before it put out, as heads in front of it do.
    """
    before = pieces[-2]
    first = max((index for index, part in enumerate(before) if weighted(part)), default=0) + 1
    pools = (i for i in range(first, len(before)) if _elements(before[i][-1]) < _elements(before[i - 1][-1]))
    start = next(pools, len(before))
    pieces[-1][:0] = before[start:]
    del before[start:]


def _elements(node: fx.Node) -> int:
    """Of one sample."""
    return math.prod(node.meta["shape"][1:])


def layer_paths(node: fx.Node) -> list[str]:
    """Layer names that the node lies in, innermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] if isinstance(entry, tuple) else entry for entry in stack.values()] + list(stack)
    found = {path.partition("@")[0] for path in paths if isinstance(path, str) and path}
    if node.op == "call_module":
        found.add(str(node.target))
    return sorted(found, key=lambda path: -path.count("."))


def _name(piece: list[fx.Node]) -> str:
    """The layer that holds every call of the piece, or its first and last layer."""
    targets = [str(node.target) for node in piece if node.op == "call_module"]
    if not targets:
        return piece[-1].name
    common = targets[0].split(".")
    for target in targets[1:]:
        parts = target.split(".")
        common = [a for a, b in zip(common, parts, strict=False) if a == b][: len(common)]
    return ".".join(common) or _span(piece)


def _span(piece: list[fx.Node]) -> str:
    targets = [_block(str(node.target)) for node in piece if node.op == "call_module"] or [piece[-1].name]
    return targets[0] if targets[0] == targets[-1] else f"{targets[0]}..{targets[-1]}"


def _block(target: str) -> str:
    """`layer4.2.conv1` -> `layer4.2`: up to the last number, else the first part."""
    parts = target.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else parts[0]
