"""Calls of torch and of layers: what they are called, what they tell of a tensor, and which line makes them."""

import functools
import inspect
import operator
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ondevice_trgl.errors import PartitionError
from ondevice_trgl.model.steps import found_in

_OURS = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parents[1]}/", "<")
_PYTHONS = f"{Path(inspect.__file__).parent}/"
METADATA = {
    "size", "dim", "stride", "numel", "nelement", "ndimension", "element_size", "is_contiguous", "is_floating_point",
    "is_complex", "is_signed", "is_conj", "is_neg", "is_inference", "is_pinned", "is_same_size", "storage_offset",
    "get_device", "type", "has_names", "__len__", "__hash__", "__get__", "__repr__", "__format__", "data_ptr",
    "untyped_storage", "retain_grad",
}  # fmt: skip
"""What tells of a tensor without reading its values."""
PLAINLY = {"item", "tolist", "numpy"}
"""What hands out the values of a tensor, and is called so that no name need be said."""
_SWAPPED = {
    "__rsub__": operator.sub, "__rdiv__": operator.truediv, "__rtruediv__": operator.truediv, "__rpow__": operator.pow,
    "__rfloordiv__": operator.floordiv, "__rmod__": operator.mod, "__rmatmul__": operator.matmul,
    "__rlshift__": operator.lshift, "__rrshift__": operator.rshift, "__rand__": operator.and_,
    "__ror__": operator.or_, "__rxor__": operator.xor, "__radd__": operator.add, "__rmul__": operator.mul,
}  # fmt: skip
_OPERATORS = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "matmul": operator.matmul,
}  # fmt: skip

_IN_PLACE = {
    "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ifloordiv__", "__imod__", "__ipow__",
    "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__", "__setitem__", "__set__",
}  # fmt: skip
"""Methods that change a tensor, beside those whose name ends with an underscore."""
_MANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


def input_name(model: nn.Module) -> str:
    """What `forward` calls its input. Raises PartitionError where it cannot be called with one."""
    places = inspect.signature(model.forward).parameters.values()
    names = [place.name for place in places if place.kind in (place.POSITIONAL_ONLY, place.POSITIONAL_OR_KEYWORD)]
    needed = [place.name for place in places if place.default is place.empty and place.kind not in _MANY]
    if len(needed) > 1:
        raise PartitionError(
            f"{type(model).__name__}.forward takes {len(needed)} inputs ({', '.join(needed)}), expected one",
            hint="wrap the network so that it takes one tensor",
        )
    return names[0] if names else "input"


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one call: it has no children, is of torch.nn, or has hooks on its backward pass."""
    if next(module.children(), None) is None or isinstance(module, torch.jit.ScriptModule):
        return True
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    kind = type(module)
    container = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or "Transformer" in kind.__name__
    return kind.__module__.startswith("torch.nn") and not container


def user_line() -> str:
    """File and line of the innermost frame that is neither torch's nor ours, with a colon; "" where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_users(frame):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}: "
        frame = frame.f_back
    return ""


def is_users(frame: FrameType) -> bool:
    """Whether a frame runs code that is neither torch's nor ours."""
    name = frame.f_code.co_filename
    return not (name.startswith(_OURS) or (name.startswith(_PYTHONS) and "-packages" not in name))


def file_of(module: nn.Module) -> str:
    code = getattr(type(module).forward, "__code__", None)
    return "" if code is None else f"{code.co_filename}:{code.co_firstlineno}: "


@functools.cache
def applying(kind: Any) -> Callable[..., Any]:
    """`kind.apply` of an autograd Function as a plain function, which a graph can name."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        return kind.apply(*args, **kwargs)

    apply.__name__ = apply.__qualname__ = f"{kind.__name__}_apply"
    apply.__module__ = __name__  # of torch's own functions a graph would look for it in torch
    return apply


@functools.cache
def scripted(function: Any) -> Callable[..., Any]:
    """A function of TorchScript as a plain one, which a graph can name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__name__ = call.__qualname__ = f"{function.name}_script"
    call.__module__ = __name__
    return call


def may_change(module: nn.Module) -> Iterator[Tensor]:
    """The parameters that `module`, kept whole, may change in its forward: layers of torch change none."""
    for layer in module.modules():
        hooked = layer._forward_hooks or layer._forward_pre_hooks or getattr(layer, "max_norm", None) is not None
        if hooked or not type(layer).__module__.startswith("torch."):
            yield from module.parameters()
            return


def changed_by(name: str, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that a call of torch of that name writes into."""
    yield from tensors_in((kwargs.get("out"),))
    if args and ((name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE):
        yield from tensors_in((args[0],))


def named(func: Any, name: str, args: tuple[Any, ...]) -> tuple[str, Any, tuple[Any, ...]]:
    """(op, target, args) of a call of torch."""
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__)
    method = getattr(func, "__qualname__", "").startswith(("TensorBase.", "Tensor."))
    if name in _SWAPPED and method:
        return "call_function", _SWAPPED[name], (args[1], args[0])
    if name in _OPERATORS and method and len(args) == 2:
        return "call_function", _OPERATORS[name], args
    if name.startswith("__") and method and hasattr(operator, name):
        return "call_function", getattr(operator, name), args
    return ("call_method", name, args) if method else ("call_function", func, args)


def is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, PLAIN)


def is_sequence(value: Any) -> bool:
    return isinstance(value, tuple | list) and not isinstance(value, torch.Size)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in what a call is given or gives."""
    return found_in(value, Tensor)
