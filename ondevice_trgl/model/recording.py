"""One forward pass of a network, recorded: every call of torch and of a layer, in order, with what it was given.

The pass is a real one, on real tensors and with the network's own Python: whatever `forward` tests, asserts, computes
or looks up is what it is, and only the calls of torch that are left of it are recorded. What a single pass cannot tell
(what depends on the batch size, on the mode) is found by comparing several (`graph.py`).
"""

import contextlib
import functools
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ondevice_trgl.model.calls import (
    METADATA,
    PLAIN,
    PLAINLY,
    applying,
    changed_by,
    file_of,
    input_name,
    is_leaf,
    is_plain,
    is_sequence,
    may_change,
    named,
    scripted,
    tensors_in,
    user_line,
)
from ondevice_trgl.model.inplace import RANDOM, changes_its_input
from ondevice_trgl.model.patches import patched
from ondevice_trgl.model.steps import BackwardInsideError, Ref, Step, Untraceable, refs_in
from ondevice_trgl.model.store import tensors_of
from ondevice_trgl.model.untouched import kept, random_state, same_random_state, set_random_state


class Recorder(TorchFunctionMode):
    """Records what runs inside. `leaves` are paths of modules that are not looked into, beside those that never are.

    A module that turns out to be one of them is added there. `backward`: forward runs backward passes of its own.
    """

    def __init__(self, model: nn.Module, leaves: set[str], *, backward: bool = False) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._model, self._leaves, self._backward = model, leaves, backward
        self._modules = dict(model.named_modules())
        self._paths = {id(module): path for path, module in self._modules.items()}
        self._places = {id(tensor): path for path, tensor in tensors_of(model)}
        strided = (p for p in model.parameters() if p.layout == torch.strided and p.numel())
        self._trained = {p.untyped_storage().data_ptr() for p in strided}
        self._fetched: dict[str, Ref] = {}
        self._known: dict[int, tuple[weakref.ref[Tensor], Ref]] = {}
        self._stack: list[tuple[str, type]] = []
        self._quiet = False
        self._thread = threading.get_ident()
        self._autocast = torch.is_autocast_enabled("cpu")
        self.constants: dict[str, Tensor] = {}
        self.numbers: dict[tuple[int, Any], tuple[Any, str]] = {}
        """Python's, which the pass changed."""
        self.calls: list[tuple[str, tuple[tuple[str, Any], ...]]] = []
        """Modules that were looked into, as they returned, with what they called."""

    def run(self, example: Tensor) -> Any:
        """`model(example)`, hooks included. Raises Untraceable, and whatever the model raises."""
        self._bind(example, self._add("placeholder", input_name(self._model), (), {}))
        # what autograd would keep for a backward pass that never comes is not kept
        saved = (
            contextlib.nullcontext() if self._backward else torch.autograd.graph.saved_tensors_hooks(_nothing, _wanted)
        )
        with patched(self._call, self._assign, self._apply, self._script), self, torch.enable_grad(), saved:
            return self._model(example)

    def made(self, tensor: Tensor) -> bool:
        """Whether a recorded call made `tensor`, of samples or of the network's state."""
        known = self._known.get(id(tensor)) if id(tensor) not in self._places else None
        return known is not None and known[0]() is tensor and not self.steps[known[1].index].pure

    def first_use(self, tensors: Sequence[Tensor]) -> Step | None:
        """The step that reads one of `tensors`, which were there before."""
        paths = {self._places.get(id(tensor)) for tensor in tensors}
        return next((step for step in self.steps if step.op == "get_attr" and step.target in paths), None)

    def output(self, value: Tensor) -> None:
        """`value` is what the network returns."""
        returned = self._ref(value)
        self._add("output", "output", (returned,), {})
        self.steps[-1].line = file_of(self._model)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._quiet:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "backward" or func is torch.autograd.grad:
            raise self._untraceable("runs a backward pass of its own")
        self._must_not_change(name, args, kwargs)
        inputs = list(tensors_in((args, kwargs)))
        had_gradient = any(tensor.requires_grad for tensor in inputs)
        result = func(*args, **kwargs)
        makes_tensors = next(tensors_in(result), None) is not None
        if name == "__setitem__" or makes_tensors:
            if not inputs and name in ("as_tensor", "tensor", "asarray", "scalar_tensor") and not is_plain(args):
                return result  # of an array: a constant, taken as it is where it is used
            op, target, args = named(func, name, args)
            return self._record(op, target, args, kwargs, result, had_gradient=had_gradient)
        elif name not in METADATA and not isinstance(result, torch.dtype | torch.Size | torch.device):
            self._must_be_constant(inputs, name)
        return result

    def _call(self, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        path = self._paths.get(id(module))
        if self._quiet or path is None or threading.get_ident() != self._thread:
            return call(module, *args, **kwargs)
        if path and (path in self._leaves or is_leaf(module)):
            return self._whole(path, functools.partial(call, module), args, kwargs)
        if not path and (module._backward_hooks or module._backward_pre_hooks):
            raise Untraceable("has a hook on its backward pass, which no module of it would have", "", file_of(module))
        start, numbers = len(self.steps), random_state()
        try:
            result = self._looked_into(path, call, module, args, kwargs)
        except Untraceable:
            if not path:
                raise
            self._leaves.add(path)
            self._forget(start)
            set_random_state(numbers)
            return self._whole(path, functools.partial(call, module), args, kwargs)
        self.calls.append((path, tuple((step.op, step.target) for step in self.steps[start:])))
        return result

    def _whole(self, path: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        layer = self._modules[path]
        if any(id(parameter) not in self._places for parameter in layer.parameters()):
            raise self._untraceable(f"calls {path} with other parameters than its own")
        trained = any(p.requires_grad for p in layer.parameters())
        had_gradient = trained or any(tensor.requires_grad for tensor in tensors_in((args, kwargs)))
        with kept(may_change(layer)):
            result = self._silently(call, args, kwargs)
        return self._record("call_module", path, args, kwargs, result, had_gradient=had_gradient)

    def _looked_into(self, path: str, call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        before = random_state()
        self._stack.append((path, type(module)))
        try:
            result = call(module, *args, **kwargs)
        finally:
            self._stack.pop()
        if not same_random_state(random_state(), before):
            raise Untraceable("draws from Python's or numpy's random numbers", path, file_of(module))
        return result

    def _forget(self, start: int) -> None:
        """Drop the steps from number `start` on."""
        del self.steps[start:]
        self._fetched = {path: ref for path, ref in self._fetched.items() if ref.index < start}
        self._known = {key: known for key, known in self._known.items() if known[1].index < start}

    def _apply(self, apply: Callable[..., Any], kind: Any, args: Any, kwargs: Any) -> Any:
        if self._quiet or threading.get_ident() != self._thread:
            return apply(kind, *args, **kwargs)
        if (kind.__module__, kind.__name__) == ("torch.utils.checkpoint", "CheckpointFunction"):
            return args[0](*args[2:])  # behind whether it keeps random numbers
        return self._one_call(functools.partial(apply, kind), applying(kind), args, kwargs)

    def _script(self, call: Callable[..., Any], function: Any, args: Any, kwargs: Any) -> Any:
        if self._quiet or threading.get_ident() != self._thread:
            return call(function, *args, **kwargs)
        return self._one_call(functools.partial(call, function), scripted(function), args, kwargs)

    def _one_call(self, call: Callable[..., Any], target: Any, args: Any, kwargs: Any) -> Any:
        had_gradient = any(tensor.requires_grad for tensor in tensors_in((args, kwargs)))
        result = self._silently(call, args, kwargs)
        return self._record("call_function", target, args, kwargs, result, had_gradient=had_gradient)

    def _assign(self, assign: Callable[..., Any], module: nn.Module, name: str, value: Any) -> None:
        if not (isinstance(value, Tensor) and self._set_buffer(module, name, value)):
            assign(module, name, value)

    def _silently(self, work: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._quiet = True
        numbers = random_state()
        try:
            with torch._C.DisableTorchFunction():
                return work(*args, **kwargs)
        finally:
            self._quiet = False
            set_random_state(numbers)  # what is kept whole may draw: it runs each time

    def _set_buffer(self, module: nn.Module, name: str, value: Tensor) -> bool:
        """A buffer is given another tensor: recorded as a change of the one that is there. False where it is not so."""
        old = module.__dict__["_buffers"].get(name) if id(module) in self._paths else None
        if self._quiet or old is None or value is old or threading.get_ident() != self._thread:
            return False
        if value.requires_grad or value.shape != old.shape or value.dtype != old.dtype:
            raise self._untraceable(f"gives the buffer {name} another shape or dtype, or a gradient,")
        with torch._C.DisableTorchFunction(), torch.no_grad():
            old.copy_(value)
        self._record("call_method", "copy_", (old, value), {}, old, had_gradient=False)
        return True

    def _record(self, op: str, target: Any, args: Any, kwargs: Any, result: Any, *, had_gradient: bool) -> Any:
        """Add a call that was made; returns what is to be handed on as its result."""
        if torch.is_autocast_enabled("cpu") != self._autocast:
            raise self._untraceable("switches autocast on or off")
        steps, given = self.steps, list(tensors_in((args, kwargs)))
        args, kwargs = self._referring(args), self._referring(kwargs)
        inputs = [steps[ref.index] for ref in refs_in((args, kwargs))]
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        ref = self._add(op, target, args, kwargs)
        step = steps[ref.index]
        step.pure = op != "call_module" and name not in RANDOM and all(before.pure for before in inputs)
        step.cut_off = had_gradient and not torch.is_grad_enabled()
        if args and isinstance(args[0], Ref) and changes_its_input(step, self._modules):
            changed = steps[args[0].index]
            changed.pure = changed.pure and (step.pure or target is not operator.setitem)
            if changed.target in self.constants:
                raise self._untraceable("changes a tensor that is neither a buffer nor an attribute of a module")
        if any(result is tensor for tensor in given) and not changes_its_input(step, self._modules):
            # dropout returns its very input in eval mode: here it is a tensor of its own in either
            with torch._C.DisableTorchFunction():
                result = result.view_as(result)
        self._bind(result, ref)
        return result

    def _add(self, op: str, target: Any, args: Any, kwargs: Any) -> Ref:
        self.steps.append(Step(op, target, args, kwargs, tuple(self._stack), user_line()))
        return Ref(len(self.steps) - 1)

    def _bind(self, value: Any, ref: Ref) -> None:
        if isinstance(value, Tensor):
            step = self.steps[ref.index]
            step.shape, step.dtype = tuple(value.shape), value.dtype
            self._known[id(value)] = weakref.ref(value), ref
            return
        items = value.items() if isinstance(value, dict) else enumerate(value) if is_sequence(value) else ()
        for key, item in items:
            if next(tensors_in(item), None) is not None:
                whole, inner = self.steps[ref.index], self._add("call_function", operator.getitem, (ref, key), {})
                self.steps[inner.index].pure, self.steps[inner.index].cut_off = whole.pure, whole.cut_off
                self._bind(item, inner)

    def _ref(self, tensor: Tensor) -> Ref:
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        path = self._places.get(id(tensor))
        if path is None:
            if tensor.requires_grad and tensor.is_leaf:
                raise self._untraceable("uses a parameter that no module of it holds, as in a plain list")
            if tensor.requires_grad or tensor.layout != torch.strided:
                raise self._untraceable("uses a tensor that was not made by calls of torch that can be recorded")
            path = f"_constant_{len(self.constants)}"
            self.constants[path] = tensor
            self._places[id(tensor)] = path  # which `constants` keeps alive
        if path not in self._fetched:
            self._fetched[path] = self._add("get_attr", path, (), {})
            step = self.steps[-1]
            step.shape, step.dtype = tuple(tensor.shape), tensor.dtype
        return self._fetched[path]

    def _referring(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._ref(value)
        if isinstance(value, slice):
            return slice(*(self._referring(part) for part in (value.start, value.stop, value.step)))
        if isinstance(value, torch.Size):
            return tuple(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            raise self._untraceable(f"calls with a {type(value).__name__}, which no list of calls can hold,")
        if isinstance(value, tuple | list):
            items = [self._referring(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, dict):
            return {key: self._referring(item) for key, item in value.items()}
        if value is None or value is Ellipsis or isinstance(value, PLAIN):
            return value
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
            return value.item()  # of numpy
        raise self._untraceable(f"calls with a {type(value).__name__}, which no list of calls can hold,")

    def _must_be_constant(self, inputs: list[Tensor], name: str) -> None:
        if name == "__set__":
            raise self._untraceable("sets an attribute of a tensor")
        if name.startswith("register_"):
            raise self._untraceable(f"hangs a hook on a tensor ({name}), which it would not have in a module")
        refs = [self._ref(tensor) for tensor in inputs]
        if not all(self.steps[ref.index].pure for ref in refs):
            what = "tests" if name == "__bool__" else "reads" if name in PLAINLY else f"({name}) reads"
            raise self._untraceable(f"{what} values that depend on the data or on the network's state")

    def _must_not_change(self, name: str, args: Any, kwargs: Any) -> None:
        """Parameters are the optimizer's alone. Looked at before the call: they are not copied to be put back."""
        for tensor in changed_by(name, args, kwargs):
            if isinstance(tensor, nn.Parameter) or (
                tensor.layout == torch.strided
                and tensor.numel()
                and tensor.untyped_storage().data_ptr() in self._trained
            ):
                raise self._untraceable("changes a parameter")

    def _untraceable(self, reason: str) -> Untraceable:
        return Untraceable(reason, self._stack[-1][0] if self._stack else "", user_line())


def _nothing(_: Any) -> Any:
    return None


def _wanted(_: Any) -> Any:
    raise BackwardInsideError
