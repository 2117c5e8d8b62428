"""Where a chain is cut into modules: a number of them, balanced, or the names of the layers that they end with."""

import difflib
from collections.abc import Callable, Sequence

from torch import fx

from ondevice_trgl.errors import PartitionError
from ondevice_trgl.model.store import parameter_count
from ondevice_trgl.model.trace import Chain, Segment

_FEW = 3
"""So few segments that whoever asked for more wants to know why."""


def check_count(chain: Chain, count: int, most: int | None = None) -> None:
    """Raises PartitionError where `count` modules cannot be had; `most`: None where every segment can be one."""
    most = len(chain.segments) if most is None else most
    if not 1 <= count <= most:
        into = f"into 1 to {most} modules" if most > 1 else "nowhere"
        why = _why_not_more(chain) if most <= _FEW else ""
        raise PartitionError(
            f"modules = {count}: this network can be cut {into}{why}",
            hint=f"ask for {most} or fewer (modules=, or --modules), or 'auto'",
        )


def _why_not_more(chain: Chain) -> str:
    """Of the places where a network is not cut, what crosses at the one where least does; "" where there is none."""
    nodes = [node for segment in chain.segments for node in segment.nodes]
    position = {node: i for i, node in enumerate(nodes)}
    ends = {segment.output for segment in chain.segments}
    least: tuple[fx.Node, list[fx.Node]] | None = None
    alive: list[fx.Node] = []
    for i, node in enumerate(nodes[:-1]):
        alive = [n for n in (*alive, node) if any(position.get(user, -1) > i for user in n.users)]
        if node.op == "placeholder" or node in ends or len(alive) < 2:
            continue
        if least is None or len(alive) < len(least[1]):
            least = node, alive
    if least is None:
        return ""
    node, crossing = least
    lines = [(n.name, str(n.meta.get("line", "")).rstrip(": ")) for n in crossing[:3]]
    names = ", ".join(f"{name} ({line})" if line else name for name, line in lines)
    return f"; elsewhere more than one tensor crosses: behind {node.name} {len(crossing)}, which are {names}"


def even_bounds(chain: Chain, count: int) -> tuple[int, ...]:
    """`count` modules with near equal loads; the load of a segment is its parameters and the elements it puts out."""
    check_count(chain, count)
    loads = [_load(chain, segment) for segment in chain.segments]
    return balance(count, len(loads), lambda a, b: sum(loads[a:b]))[-1]


def _load(chain: Chain, segment: Segment) -> float:
    names = {str(node.target) for node in segment.nodes if node.op == "call_module"}
    parameters = parameter_count(*map(chain.root.get_submodule, names))
    elements = 0
    for node in segment.nodes:
        size = 1
        for side in node.meta.get("shape", (0, 0))[1:]:
            size *= side
        elements += size
    return 3.0 * parameters + 32.0 * elements


def balance(most: int, length: int, cost: Callable[[int, int], float]) -> list[tuple[int, ...]]:
    """For 1, 2, ... `most` consecutive groups of `length` items: the bounds whose largest `cost(start, stop)` is least.

    Dynamic programme over (groups, items). Among equals the later groups are kept small.
    """
    worst = [0.0, *(float(cost(0, stop)) for stop in range(1, length + 1))]
    choice: list[list[int]] = [[0] * (length + 1)]
    for k in range(1, most):
        row, picks = [float("inf")] * (length + 1), [0] * (length + 1)
        for stop in range(k + 1, length + 1):
            for start in range(k, stop):
                largest = max(worst[start], float(cost(start, stop)))
                if largest <= row[stop]:
                    row[stop], picks[stop] = largest, start
        worst = row
        choice.append(picks)
    groupings = []
    for count in range(1, most + 1):
        bounds = [length]
        for k in range(count - 1, 0, -1):
            bounds.append(choice[k][bounds[-1]])
        groupings.append((0, *reversed(bounds)))
    return groupings


def named_bounds(chain: Chain, names: Sequence[str]) -> tuple[int, ...]:
    """Bounds at the ends of the named layers. Raises PartitionError for a name at which no single tensor crosses."""
    bounds = [0]
    for name in names:
        stop = cut_behind(chain, name)
        if stop <= bounds[-1]:
            raise PartitionError(f"boundary {name!r} is not behind the one before it", hint="name them in order")
        bounds.append(stop)
    return (*bounds, len(chain.segments))


def cut_behind(chain: Chain, name: str, *, what: str = "") -> int:
    """How many segments end with the layer `name`. Raises PartitionError where no single tensor crosses behind it.

    `what`: the setting that names it, where that is not `modules`.
    """
    cuts = {name: segment.index + 1 for segment in chain.segments[:-1] for name in segment.ends}
    if name not in cuts:
        near = difflib.get_close_matches(name, cuts, n=3)
        setting = f"{what} = {name!r}: " if what else ""
        raise PartitionError(
            f"{setting}no boundary at {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""),
            hint=f"layers after which a module can end: {', '.join(cuts) or 'none'}",
        )
    return cuts[name]
