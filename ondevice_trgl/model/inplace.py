"""Which nodes of a traced network change a tensor in place, and which may hand on the memory of their input."""

import operator
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import fx, nn

_VIEWS = {
    "chunk", "contiguous", "detach", "dropout", "expand", "flatten", "getitem", "movedim", "narrow", "permute",
    "reshape", "select", "split", "squeeze", "swapaxes", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip
RANDOM = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_",
    "normal", "normal_", "uniform_", "random_", "exponential_", "geometric_", "log_normal_", "cauchy_", "multinomial",
    "poisson", "dropout", "dropout1d", "dropout2d", "dropout3d", "dropout_", "alpha_dropout", "feature_dropout",
    "feature_alpha_dropout", "rrelu", "gumbel_softmax", "scaled_dot_product_attention", "multi_head_attention_forward",
}  # fmt: skip
"""Functions whose result is, or may be, another one each time."""
_IN_PLACE_OPERATORS = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}


class Call(Protocol):
    """A node of a graph, or a step of a recorded pass."""

    op: str
    target: Any
    args: Any
    kwargs: Any


def operation(node: Call) -> str:
    """The name of the function, method or layer that `node` calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def changes_its_input(node: Call, modules: Mapping[str, nn.Module]) -> bool:
    """Whether `node` writes into its first operand (or, with `out=`, into another)."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = operation(node)
    return (
        (name.endswith("_") and not name.endswith("__"))
        or node.target in _IN_PLACE_OPERATORS
        or bool(node.kwargs.get("inplace"))
        or node.kwargs.get("out") is not None
        or any(value is True for value in node.args[1:])  # relu(x, True); a needless yes costs next to nothing
    )


def overwritten(node: fx.Node, modules: Mapping[str, nn.Module], behind: fx.Node | None = None) -> bool:
    """Whether anything (after the node `behind`, where given) may write into the value of `node`."""
    return next(writers(node, modules, behind), None) is not None


def writers(node: fx.Node, modules: Mapping[str, nn.Module], behind: fx.Node | None = None) -> Iterator[fx.Node]:
    """The nodes that may write into the value of `node`, also through views and layers that return their input."""
    for user in node.users:
        if user.op == "output" or (behind is not None and not behind < user):
            continue
        first = user.args[0] if user.args else user.kwargs.get("input")
        into_this = first is node or user.kwargs.get("out") is node
        if into_this and changes_its_input(user, modules):
            yield user
        if _may_alias(user, modules):
            yield from writers(user, modules, behind)


def _may_alias(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op != "call_module":
        return operation(node) in _VIEWS
    module = modules[str(node.target)]
    fresh = type(module).__module__.startswith(("torch.nn.modules.activation", "torch.nn.modules.pooling"))
    return not fresh and next(module.parameters(), None) is None
