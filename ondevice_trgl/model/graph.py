"""The graph of a network, traced with torch.fx, and the shapes in it.

The trace is symbolic, so it costs no activation memory, keeps every parameter and its name, and needs no import that
`import torch` has not made already (torch.export would add `torch._dynamo` and sympy: 90 MB).
"""

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ondevice_trgl.errors import PartitionError
from ondevice_trgl.model.inplace import changes_its_input


class _Tracer(fx.Tracer):
    """Modules without children are leaves, so that they keep their own idea of train and eval mode."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None or super().is_leaf_module(m, module_qualified_name)


class _Shapes(fx.Interpreter):
    """Notes the shape and dtype of every tensor of one real forward pass, freeing each as soon as it is used up."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"], n.meta["dtype"] = tuple(result.shape), result.dtype
        return result


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Every layer in the mode, train or eval, that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def graph_of(model: nn.Module) -> fx.Graph:
    """The graph of `model`, whose one placeholder is its input. Raises PartitionError where it cannot be traced."""
    try:
        with _modes_kept(model):
            model.eval()
            evaluating = _Tracer().trace(model)
            model.train()
            graph = _Tracer().trace(model)
    except Exception as error:  # whatever the user's forward raises under symbolic values
        raise PartitionError(
            f"{type(model).__name__} cannot be traced: {_where(error)}{error}",
            hint="keep data-dependent control flow inside a leaf module (one without child modules)",
        ) from error
    _follow_the_mode(model, graph, evaluating)
    inputs = [node for node in graph.nodes if node.op == "placeholder" and (node.users or not node.args)]
    if len(inputs) != 1:
        names = ", ".join(str(node.target) for node in inputs)
        raise PartitionError(
            f"{type(model).__name__}.forward takes {len(inputs)} inputs ({names}), expected one",
            hint="wrap the network so that it takes one tensor",
        )
    modules = dict(model.named_modules())
    kept = ("placeholder", "output", "call_module")
    graph.eliminate_dead_code(lambda node: node.op in kept or changes_its_input(node, modules))
    for node in list(graph.nodes):
        if node.op == "placeholder" and node is not inputs[0]:
            graph.erase_node(node)  # an optional input that the network does not look at
    return graph


def _follow_the_mode(model: nn.Module, graph: fx.Graph, evaluating: fx.Graph) -> None:
    """Make what `forward` reads from `self.training` follow the mode: a trace fixes it to that of the moment.

    `graph` was traced in train mode, `evaluating` in eval mode. Raises PartitionError where they differ by more.
    """

    def unlike() -> PartitionError:
        return PartitionError(
            f"{type(model).__name__} computes something else in train mode than in eval mode",
            hint="keep what depends on self.training inside a leaf module (one without child modules)",
        )

    if len(graph.nodes) != len(evaluating.nodes):
        raise unlike()
    mode: fx.Node | None = None
    twins: dict[fx.Node, fx.Node] = {}  # from `evaluating` to `graph`
    for node, other in zip(list(graph.nodes), evaluating.nodes, strict=True):
        twins[other] = node
        if node.op == "get_attr" and other.op == "get_attr" and _is_same_constant(model, node, other):
            continue
        values, others = [*node.args, *node.kwargs.values()], [*other.args, *other.kwargs.values()]
        same_call = (node.op, node.target, list(node.kwargs)) == (other.op, other.target, list(other.kwargs))
        if not same_call or len(values) != len(others):
            raise unlike()
        for i, (value, twin) in enumerate(zip(values, others, strict=True)):
            if value is True and twin is False:
                if mode is None:
                    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
                        mode = graph.get_attr("training")
                values[i] = mode
            elif str(value) != str(fx.map_arg(twin, twins.__getitem__)):
                raise unlike()
        node.args = tuple(values[: len(node.args)])
        node.kwargs = dict(zip(node.kwargs, values[len(node.args) :], strict=True))


def _is_same_constant(model: nn.Module, node: fx.Node, other: fx.Node) -> bool:
    """Tensors that `forward` makes are stored anew by each trace."""
    one, two = (operator.attrgetter(str(n.target))(model) for n in (node, other))
    if one is two:  # a parameter: nothing to read
        return isinstance(one, Tensor)
    return isinstance(one, Tensor) and isinstance(two, Tensor) and torch.equal(one, two)


def _where(error: BaseException) -> str:
    """File and line of the user's own frame that stopped the trace."""
    place = ""
    traceback = error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if "/torch/" not in file and not file.startswith("<") and file != __file__:
            place = f"{file}:{traceback.tb_lineno}: "
        traceback = traceback.tb_next
    return place


def note_shapes(model: nn.Module, graph: fx.Graph, example_input: Tensor) -> None:
    """Give every node its `meta["shape"]` and `meta["dtype"]`: one forward pass in eval mode without gradients.

    Raises PartitionError where the network does not accept the input.
    """
    try:
        with _modes_kept(model), torch.no_grad():
            model.eval()
            _Shapes(model, graph=graph).run(example_input.clone())
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PartitionError(
            f"{type(model).__name__} does not accept an input of shape {tuple(example_input.shape)}: {reason}",
            hint="check the number of channels and the image size that the network expects",
        ) from error
