"""A network as a chain of segments: its graph cut wherever exactly one tensor crosses."""

import dataclasses
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ondevice_trgl.errors import PartitionError
from ondevice_trgl.model.graph import graph_of, note_shapes
from ondevice_trgl.model.heads import head_limit
from ondevice_trgl.model.layout import Layout, layouts_of
from ondevice_trgl.model.residual import Residual, find_residuals, is_weighted

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
    graph: fx.Graph
    in_shape: Shape
    """Of one sample."""
    in_dtype: torch.dtype
    num_outputs: int
    """Width of the network's output: classes."""
    segments: tuple[Segment, ...]


def trace(model: nn.Module, example_input: Tensor) -> Chain:
    """The chain of `model`. `example_input` is a batch (B, ...) of at least one sample; B is not baked in.

    Runs one forward pass in eval mode without gradients. Raises PartitionError where the network cannot be traced,
    takes or returns something other than one tensor, or does not accept the input.
    """
    graph = graph_of(model)
    note_shapes(model, graph, example_input)
    output = next(node for node in graph.nodes if node.op == "output")
    result = output.args[0]
    if not isinstance(result, fx.Node) or "shape" not in result.meta:
        raise PartitionError(
            f"{type(model).__name__}.forward returns {type(result).__name__}, expected one tensor",
            hint="wrap the network so that it returns its logits alone",
        )
    if len(result.meta["shape"]) != 2:
        raise PartitionError(
            f"{type(model).__name__} returns a tensor of shape {result.meta['shape']}, expected (batch, classes)",
            hint="wrap the network so that it returns one row of logits for each sample",
        )
    return chain_from(model, graph, tuple(example_input.shape[1:]), example_input.dtype)


def chain_from(
    model: nn.Module,
    graph: fx.Graph,
    in_shape: Shape,
    in_dtype: torch.dtype,
    names: list[tuple[str, tuple[str, ...]]] | None = None,
) -> Chain:
    """The chain of a graph whose nodes carry shapes. `names` are names and ends of the segments, where they are known.

    No tensor of `model` is read, only shapes.
    """
    segments = tuple(_segments(model, graph))
    if names is not None:
        pairs = zip(segments, names, strict=True)
        segments = tuple(dataclasses.replace(segment, name=name, ends=ends) for segment, (name, ends) in pairs)
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    assert isinstance(result, fx.Node)
    return Chain(model, graph, in_shape, in_dtype, int(result.meta["shape"][1]), segments)


def _segments(model: nn.Module, graph: fx.Graph) -> Iterator[Segment]:
    nodes = [node for node in graph.nodes if node.op not in ("output", "get_attr")]
    modules = dict(model.named_modules())
    layouts = layouts_of(graph, modules)
    pieces = _split(nodes, _cuts(model, graph, nodes, layouts))
    pieces = _merge(pieces, lambda piece: any(is_weighted(node, modules, model) for node in piece))
    residuals = find_residuals(graph, model)
    names = [_name(piece) for piece in pieces]
    for index, piece in enumerate(pieces):
        inside = set(piece)
        later = {path for rest in pieces[index + 1 :] for node in rest for path in _paths(node)}
        yield Segment(
            index=index,
            name=names[index] if names.count(names[index]) == 1 else _span(piece),
            ends=tuple(path for path in _paths(piece[-1]) if path not in later),
            nodes=tuple(piece),
            output=piece[-1],
            out_shape=(shape := piece[-1].meta["shape"][1:]),
            channel_axis=layouts[piece[-1]].channel_axis(shape),
            head_limit=head_limit(model, piece),
            residuals=tuple(r for r in residuals if r.add in inside),
        )


def _cuts(model: nn.Module, graph: fx.Graph, nodes: list[fx.Node], layouts: dict[fx.Node, Layout]) -> list[int]:
    """Indices i such that one floating-point tensor (batch, ...) alone crosses from nodes[:i + 1] to the rest."""
    position = {node: i for i, node in enumerate(nodes)}
    batch = next(node.meta["shape"][0] for node in nodes if node.op == "placeholder")
    reach = [0] * len(nodes)  # how many values are alive behind node i
    for i, node in enumerate(nodes):
        last = max((position.get(user, len(nodes)) for user in node.users), default=i)
        for j in range(i, min(last, len(nodes))):
            reach[j] += 1
    for first, last in _shared_spans(model, graph, position):
        for j in range(first, last):
            reach[j] += 2  # a parameter in two places keeps both in one module
    return [
        i
        for i, node in enumerate(nodes[:-1])
        if reach[i] == 1
        and node.op != "placeholder"
        and node.meta.get("shape", ())[:1] == (batch,)  # rows are samples; a sequence-first layout has others
        and len(node.meta["shape"]) >= 2
        and layouts[node].rows_are_samples  # a sequence may be as long as the batch
        and node.meta["dtype"].is_floating_point
        and any(position.get(user, -1) > i for user in node.users)
    ]


def _shared_spans(model: nn.Module, graph: fx.Graph, position: dict[fx.Node, int]) -> Iterator[tuple[int, int]]:
    """For each parameter that is used more than once: the first and the last place."""
    places: dict[int, list[int]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            for parameter in model.get_submodule(str(node.target)).parameters():
                places.setdefault(id(parameter), []).append(position[node])
        elif node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(model)
            if not isinstance(value, Tensor):
                continue  # the train mode
            places.setdefault(id(value), []).extend(position[user] for user in node.users if user in position)
    for used in places.values():
        if used and min(used) != max(used):
            yield min(used), max(used)


def _split(nodes: list[fx.Node], cuts: list[int]) -> list[list[fx.Node]]:
    starts = [0, *(cut + 1 for cut in cuts)]
    return [nodes[start:stop] for start, stop in zip(starts, [*starts[1:], len(nodes)], strict=True)]


def _merge(pieces: list[list[fx.Node]], weighted: Any) -> list[list[fx.Node]]:
    """Joins pieces that have nothing to train with the one before, and the classifier with the last block."""
    merged: list[list[fx.Node]] = [[]]
    for piece in pieces:
        if weighted(piece) and any(weighted([node]) for node in merged[-1]):
            merged.append(list(piece))
        else:
            merged[-1].extend(piece)
    if len(merged) > 1:
        merged[-2].extend(merged.pop())
    return merged


def _paths(node: fx.Node) -> list[str]:
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
