"""Where an operator puts the axes of its input: permuted, dropped, added, merged, split, or left where they were.

Operators are known by name, so that `x.permute(...)`, `torch.permute(x, ...)` and a layer that does it are one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

Axes = frozenset[int]
Shape = tuple[int, ...]

_NOWHERE: Axes = frozenset()
_NO_TENSOR = {"getattr", "size", "dim", "ndimension", "numel", "len", "stride"}
_REGROUP = {"view", "reshape", "flatten", "unflatten", "viewas", "reshapeas", "ravel"}
_SWAP = {"transpose", "swapaxes", "swapdims"}
_MOVE = {"movedim", "moveaxis"}
_WIDEN = {"expand", "expandas", "broadcastto", "repeat", "tile"}
_RESIZE = _WIDEN | {
    "cat",
    "concat",
    "concatenate",
    "chunk",
    "split",
    "tensorsplit",
    "narrow",
    "glu",
    "indexselect",
    "pad",
}
_RESIZE |= {"pixelshuffle", "pixelunshuffle"}
"""The axes stay, channels too, though their sizes change."""
_REDUCE = {"mean", "sum", "amax", "amin", "max", "min", "prod", "std", "var", "median", "logsumexp", "norm", "nanmean"}
_DROP = {"select", "unbind"}
_PRODUCTS = {"matmul", "bmm", "mm"}
_KNOWN = {"torch", "_operator", "operator", "builtins", "math"}
_RECURRENT = ("rnn", "lstm", "gru")


def name_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """The operator of a node in small letters: `conv1d` for nn.Conv1d, what derives from it, and functional.conv1d.

    Empty for a layer or function that torch does not have.
    """
    target: Any = node.target
    if node.op == "call_module":
        kind = type(modules[target])
        name = next(base.__name__ for base in kind.__mro__ if base.__module__.startswith("torch.nn."))
        if name == "Module":
            name = "permute" if kind.__name__ == "Permute" and hasattr(modules[target], "dims") else ""  # torchvision's
    elif node.op == "call_function":
        home = getattr(target, "__module__", None) or "torch"  # many of torch's own have none
        name = getattr(target, "__name__", "") if home.partition(".")[0] in _KNOWN else ""
        if target is getattr and "shape" in node.meta:
            name = str(node.args[1])  # x.T
    else:
        name = str(target)
    return name.partition(".")[0].lower().replace("_", "")


def moved(node: fx.Node, source: fx.Node, axes: Axes, modules: Mapping[str, nn.Module]) -> Axes:
    """Where `axes` of the tensor `source` are in the result of `node`, which reads it. None: that cannot be known.

    The axes of a node that gives several tensors are those of each.
    """
    name, before, after = name_of(node, modules), source.meta.get("shape"), node.meta.get("shape")
    if not axes or name in _NO_TENSOR:
        return _NOWHERE
    if before is None:  # one of several tensors; the states of a recurrent layer are laid out in another way
        if name != "getitem" or (name_of(source, modules).startswith(_RECURRENT) and node.args[1] != 0):
            return _NOWHERE
        return axes
    if name in _REGROUP:
        return _NOWHERE if after is None else _regrouped(before, after, axes)
    if name in _PRODUCTS:
        return _multiplied(node, source, axes)
    origins = _origins(node, name, before, modules)
    if origins is not None:
        fits = after is None or len(after) == len(origins)
        return frozenset(i for i, origin in enumerate(origins) if origin in axes) if fits else _NOWHERE
    if after is None:
        return axes
    if len(after) != len(before):
        return _NOWHERE
    told_by = axes if name else range(len(before))
    return axes if name in _RESIZE or all(after[axis] == before[axis] for axis in told_by) else _NOWHERE


def _origins(node: fx.Node, name: str, before: Shape, modules: Mapping[str, nn.Module]) -> Sequence[int | None] | None:
    """For each axis of the result the axis of the input that it is, None for a new one.

    None for an operator that does not move axes; too few where its arguments are not numbers.
    """
    rank = len(before)
    order: list[int | None] = list(range(rank))
    after = node.meta.get("shape")
    if name == "permute":
        given = modules[str(node.target)].dims if node.op == "call_module" else _argument(node, 1, "dims")
        dims = _axes(given if isinstance(given, list | tuple) else node.args[1:], rank)
        return dims or []
    if name in _SWAP or name in _MOVE:
        sources = _axes(_argument(node, 1, "dim0", "axis0", "source"), rank)
        targets = _axes(_argument(node, 2, "dim1", "axis1", "destination"), rank)
        if not sources or len(sources) != len(targets):
            return []
        if name in _SWAP:
            order[sources[0]], order[targets[0]] = targets[0], sources[0]
            return order
        at = dict(zip(targets, sources, strict=True))
        rest = iter([axis for axis in range(rank) if axis not in sources])
        return [at[axis] if axis in at else next(rest) for axis in range(rank)]
    if name in ("t", "mt"):  # x.T reverses all
        return order[::-1] if name == "t" else [*order[:-2], *order[:-3:-1]]
    if name in ("unsqueeze", "stack"):
        dims = _axes(_argument(node, 1, "dim", default=0), rank + 1)
        return [*order[: dims[0]], None, *order[dims[0] :]] if dims else []
    if name == "squeeze":
        dims = _axes(_argument(node, 1, "dim", default=tuple(range(rank))), rank)
        return [axis for axis in range(rank) if dims and not (axis in dims and before[axis] == 1)]
    if name in _DROP:
        dims = _axes(_argument(node, 1, "dim", default=0), rank)
        return [axis for axis in range(rank) if dims and axis not in dims]
    if name in _REDUCE and (not node.kwargs.get("keepdim") if after is None else len(after) < rank):
        dims = _axes(_argument(node, 2 if name == "norm" else 1, "dim", "axis"), rank)
        return [axis for axis in range(rank) if dims and axis not in dims]
    if name in ("embedding", "onehot"):
        return [*order, None]
    if name in _WIDEN and after is not None and len(after) > rank:
        return [*[None] * (len(after) - rank), *order]
    return _indexed(node.args[1], rank) if name == "getitem" else None


def _indexed(index: Any, rank: int) -> Sequence[int | None]:
    """The axes that are left behind `x[index]`, None for new ones."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, list) or (isinstance(item, fx.Node) and "shape" in item.meta) for item in items):
        return []  # by a tensor: where its axes go depends on the others
    if not any(item is Ellipsis for item in items):
        items.append(Ellipsis)
    gap = rank - sum(item is not None and item is not Ellipsis for item in items)
    axis, origins = 0, list[int | None]()
    for item in items:
        if item is None:
            origins.append(None)
        elif item is Ellipsis:
            origins.extend(range(axis, axis + gap))
            axis += gap
        else:
            origins.extend([axis] if isinstance(item, slice) else [])
            axis += 1
    return origins


def _multiplied(node: fx.Node, source: fx.Node, axes: Axes) -> Axes:
    """Rows come from the left operand, columns from the right one; what both have is summed over."""
    shapes = [used.meta.get("shape", ()) for used in node.args[:2] if isinstance(used, fx.Node)]
    rank = len(source.meta["shape"])
    if len(shapes) < 2 or min(map(len, shapes)) < 2:
        return _NOWHERE
    gone = rank - 1 if node.args[0] is source else rank - 2
    return frozenset(axis + max(map(len, shapes)) - rank for axis in axes if axis != gone)


def _regrouped(before: Shape, after: Shape, axes: Axes) -> Axes:
    """Through a view: the axes of the smallest groups of neighbours that hold the same elements.

    Empty where several axes become several others.
    """
    found: set[int] = set()
    i = j = 0
    while i < len(before) and j < len(after):
        start, first, into, out = i, j, before[i], after[j]
        i, j = i + 1, j + 1
        while into != out:
            if (i == len(before)) if into < out else (j == len(after)):
                return _NOWHERE
            if into < out:
                into, i = into * before[i], i + 1
            else:
                out, j = out * after[j], j + 1
        if axes.isdisjoint(range(start, i)):
            continue
        wide = [axis for axis in range(first, j) if after[axis] > 1] or [first]
        if len(wide) > 1 and sum(size > 1 for size in before[start:i]) > 1:
            return _NOWHERE
        found.update(wide)
    return frozenset(found)


def _argument(node: fx.Node, place: int, *names: str, default: Any = None) -> Any:
    for name in names:
        if name in node.kwargs:
            return node.kwargs[name]
    return node.args[place] if len(node.args) > place else default


def _axes(given: Any, rank: int) -> list[int]:
    """Numbers of axes as they are counted from the front; none where one is not a number."""
    items = given if isinstance(given, list | tuple) else [given]
    numbers = [item % rank for item in items if isinstance(item, int)]
    return numbers if len(numbers) == len(items) else []
