"""The graph of a network: what several recorded passes have in common, and by what they differ.

One pass each in eval and train mode, at two batch sizes. The calls must be the same; where an argument differs by the
batch size it becomes an expression of that, where it differs by the mode it follows the mode. A module that does
something else each time, or what no list of calls can say, is kept whole: one call. Where that is the network itself,
it is refused with the line. Nothing is imported for this (torch.export would add `torch._dynamo` and sympy: 90 MB).
"""

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ondevice_trgl.errors import PartitionError
from ondevice_trgl.model.modes import Modes
from ondevice_trgl.model.passes import BATCHES, Key, check_constants, check_numbers, live, record
from ondevice_trgl.model.recording import Recorder
from ondevice_trgl.model.steps import BackwardInsideError, Ref, Step, Untraceable

_KEPT_WHOLE = "put that into a submodule of its own, which is then kept whole"


@dataclass(frozen=True)
class Traced:
    """A network's graph, with one placeholder.

    Nodes that are tensors have `meta["shape"]`, at a batch of 2, and `meta["rows"]`: whether the first axis is the
    batch. `constants` are tensors that the network uses and does not hold, by the target that reads them.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]


def graph_of(model: nn.Module, example: Tensor, modes: Modes) -> Traced:
    """The graph of `model` from forward passes on `example`, a batch of at least one sample.

    The model is left as it was. Memory: that of a forward pass at a batch of 3. Raises PartitionError where the model
    cannot be traced or does not accept the input.
    """
    leaves: set[str] = set()
    keys = [(training, size) for training in (False, True) for size in BATCHES]
    backward = settled = False
    while True:
        known = set(leaves)
        runs: dict[Key, Recorder] = {}
        try:
            for key in keys:
                runs[key] = record(model, example, leaves, modes, key, backward=backward)
            if leaves != known:
                continue  # the passes are to keep the same modules whole
            graph = _Merger(model, {key: live(run.steps, model) for key, run in runs.items()}).graph()
            check_constants(list(runs.values()))
            check_numbers(model, example, leaves, modes, runs, backward=backward)
            return Traced(graph, runs[keys[-1]].constants)
        except BackwardInsideError:
            backward = True
        except Untraceable as reason:
            whole = len(runs) == len(keys)
            if not settled:
                settled = True  # what is made once, and kept outside of the network, is there now; and an app's other
                continue  # threads may have drawn a number meanwhile
            unsteady = _unsteady([run.calls for run in runs.values()]) if whole else set()
            leaves |= unsteady or {reason.path}
            if "" in leaves or leaves == known:
                raise PartitionError(
                    f"{type(model).__name__} cannot be traced: {reason.line}it {reason.reason}", hint=_KEPT_WHOLE
                ) from None


def _unsteady(passes: Sequence[Sequence[tuple[str, Any]]]) -> set[str]:
    """The innermost modules that do not make the same calls in all passes."""
    tables: list[dict[tuple[str, int], Any]] = []
    for calls in passes:
        times: Counter[str] = Counter()
        table = {}
        for path, made in calls:
            table[path, times[path]] = made
            times[path] += 1
        tables.append(table)
    found: set[str] = set()
    for place, made in tables[0].items():  # those inside come first
        path = place[0]
        inside = any(other == path or other.startswith(f"{path}.") for other in found)
        if path and not inside and any(place in table and table[place] != made for table in tables[1:]):
            found.add(path)
    return found


class _Merger:
    """Several recordings of one network as one graph."""

    def __init__(self, model: nn.Module, runs: Mapping[Key, list[Step]]) -> None:
        self._name, self._runs = type(model).__name__, runs
        self._graph = fx.Graph()
        self._nodes: list[fx.Node] = []
        self._made: dict[Any, fx.Node] = {}
        self._stacks: list[tuple[tuple[str, type], ...]] = []
        self._line = ""

    def graph(self) -> fx.Graph:
        """The graph. Raises Untraceable where the recordings differ by more than a graph can say."""
        for steps in zip(*self._runs.values(), strict=False):
            self._stacks = [step.stack for step in steps]
            self._line = next((step.line for step in reversed(steps) if step.op != "output"), steps[-1].line)
            if any((step.op, step.target) != (steps[0].op, steps[0].target) for step in steps):
                raise self._differs([(step.op, step.target) for step in steps])
            self._nodes.append(self._node(steps))
        lengths = [len(run) for run in self._runs.values()]
        if len(set(lengths)) > 1:
            raise self._differs(lengths)
        for node in reversed(list(self._graph.nodes)):
            if not node.users and node in self._made.values():
                self._graph.erase_node(node)
        return self._graph

    def _node(self, steps: Sequence[Step]) -> fx.Node:
        args = self._unified([step.args for step in steps])
        kwargs = self._unified([step.kwargs for step in steps])
        step, other = steps[-2], steps[-1]  # in train mode
        if step.op == "output":
            end: fx.Node = self._graph.output(args[0])
            return end
        node = self._graph.create_node(step.op, step.target, args, kwargs)
        self._note(node, step, other)
        if step.cut_off and step.shape is not None:  # made without gradients: here, cut off from them
            node = self._graph.call_method("detach", (node,))
            self._note(node, step, other)
        return node

    @staticmethod
    def _note(node: fx.Node, step: Step, other: Step) -> None:
        node.meta["nn_module_stack"] = {path: (path, kind) for path, kind in step.stack if path}
        node.meta["line"] = step.line
        if step.shape is not None and other.shape is not None:
            node.meta["shape"], node.meta["dtype"] = step.shape, step.dtype
            node.meta["rows"] = (step.shape[:1], other.shape[:1]) == ((BATCHES[0],), (BATCHES[1],))

    def _unified(self, values: Sequence[Any]) -> Any:
        """One argument out of those of all passes."""
        first = values[0]
        if any(type(value) is not type(first) for value in values):
            return self._by_mode(values)
        if isinstance(first, Ref):
            if len(set(values)) > 1:
                raise self._differs(values)
            return self._nodes[first.index]
        if isinstance(first, slice):
            return slice(*(self._unified([getattr(v, part) for v in values]) for part in ("start", "stop", "step")))
        if isinstance(first, tuple | list):
            if len({len(value) for value in values}) > 1:
                raise self._differs([len(value) for value in values])
            items = [self._unified(parts) for parts in zip(*values, strict=True)]
            return tuple(items) if isinstance(first, tuple) else items
        if isinstance(first, dict):
            if any(list(value) != list(first) for value in values):
                raise self._differs(values)
            return {name: self._unified([value[name] for value in values]) for name in first}
        if isinstance(first, torch.device):
            return self._of_input(getattr, "device") if all(v == first for v in values) else self._differing(values)
        if all(value == first for value in values):
            return first
        if isinstance(first, int) and not isinstance(first, bool):
            return self._by_batch(values)
        return self._by_mode(values)

    def _differing(self, values: Sequence[Any]) -> Any:
        raise self._differs(values)

    def _by_batch(self, values: Sequence[int]) -> Any:
        """A whole number that depends on the batch size: as a multiple of it, and a rest."""
        small, large = values[0], values[1]
        if list(values) != [small, large, small, large]:
            return self._by_mode(values)
        slope = (large - small) // (BATCHES[1] - BATCHES[0])
        size = self._of_input("size", 0)
        rest = small - slope * BATCHES[0]
        if slope != 1:
            size = self._once(("times", slope), lambda: self._graph.call_function(operator.mul, (size, slope)))
        if rest:
            size = self._once(("plus", slope, rest), lambda: self._graph.call_function(operator.add, (size, rest)))
        return size

    def _by_mode(self, values: Sequence[Any]) -> Any:
        """A constant that is one in eval mode and another in train mode."""
        evaluating, training = values[0], values[2]
        plain = all(value is None or isinstance(value, bool | int | float | str) for value in values)
        if not plain or values[1] != evaluating or values[3] != training:
            raise self._differs(values)
        mode = self._once("training", lambda: self._graph.get_attr("training"))
        if (evaluating, training) == (False, True):
            return mode
        key = ("mode", repr(evaluating), repr(training))
        return self._once(key, lambda: self._graph.call_function(operator.getitem, ((evaluating, training), mode)))

    def _of_input(self, how: Any, what: Any) -> fx.Node:
        """What is read from the input itself."""
        start = self._nodes[0]
        kind = "call_method" if isinstance(how, str) else "call_function"
        return self._once((how, what), lambda: self._graph.create_node(kind, how, (start, what)))

    def _once(self, key: Any, make: Any) -> fx.Node:
        if key not in self._made:
            with self._graph.inserting_after(next(iter(reversed(self._made.values())), self._nodes[0])):
                self._made[key] = make()
        return self._made[key]

    def _differs(self, values: Sequence[Any]) -> Untraceable:
        """`values` are those of the passes, in order."""
        by_mode = repr(values[0]) == repr(values[1]) and repr(values[2]) == repr(values[3])
        if by_mode:
            reason = "computes something else in train mode than in eval mode"
        else:
            reason = "computes something else for another number of samples"
        common = ""
        for entries in zip(*self._stacks, strict=False):
            if len({path for path, _ in entries}) > 1:
                break
            common = entries[0][0]
        return Untraceable(reason, common, self._line)
