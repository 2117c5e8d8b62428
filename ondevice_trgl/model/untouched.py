"""A network left as it was, whatever its forward passes do: modes, buffers, attributes, gradients, random numbers."""

import contextlib
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ondevice_trgl.model.store import tensors_of

_COPIED_BYTES = 1 << 20
"""A tensor that is no parameter and no larger is put back by value where it changed."""
_KEPT_BYTES = 1 << 24
"""So are parameters of a module that may change them itself, as long as they are not more than this in all."""
_CONTAINERS = {dict, OrderedDict, defaultdict, Counter, list, set, deque}
_LOOKED_INTO = 1000
"""Items of a container up to which what is inside of it is looked at too."""


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts back what runs inside: what modules hold, values of buffers, and the state of random number generators.

    Lists and dicts that modules hold have what they had. Parameters are not copied: what no forward pass should change.
    Memory: copies of the buffers.
    """
    modules = own_modules(model)
    held = [dict(module.__dict__) for module in modules]
    containers = [(container, _items(container)) for container, _ in containers_of(model)]
    values = [(tensor, tensor.detach().clone()) for tensor in _loose(model)]
    gradients = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    numbers = torch.get_rng_state(), random_state()
    try:
        yield
    finally:
        for module, before in zip(modules, held, strict=True):
            module.__dict__.clear()
            module.__dict__.update(before)
        for container, items in containers:
            _put_back(container, items)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):  # a norm moves its statistics without a trace in `_version`
                    tensor.copy_(value)
        for parameter, gradient, trained in gradients:
            parameter.grad = gradient
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)
        torch.set_rng_state(numbers[0])
        set_random_state(numbers[1])


@contextlib.contextmanager
def kept(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Puts back the values of `parameters`, and where they lie; afterwards the list holds those that were changed."""
    moved: list[Tensor] = []
    values, room = [], _KEPT_BYTES
    with torch._C.DisableTorchFunction():
        for parameter in parameters:
            room -= parameter.numel() * parameter.element_size()
            if room < 0:
                break
            values.append((parameter, parameter.data, parameter.detach().clone()))
    try:
        yield moved
    finally:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for parameter, place, value in values:
                changed = parameter.shape != value.shape or not torch.equal(parameter, value)
                if changed or parameter.data_ptr() != place.data_ptr():
                    parameter.data = place
                    if not torch.equal(place, value):
                        place.copy_(value)
                if changed:
                    moved.append(parameter)


def own_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` whose attributes are Python's: not those of TorchScript."""
    return [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]


def containers_of(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """The lists, dicts and sets that modules hold, and those inside of them, each once, with a name."""
    seen: set[int] = set()

    def inside(value: Any, name: str) -> Iterator[tuple[Any, str]]:
        if id(value) in seen:
            return
        seen.add(id(value))
        yield value, name
        if len(value) <= _LOOKED_INTO:
            for item in list(value.values() if isinstance(value, dict) else value):
                if type(item) in _CONTAINERS:
                    yield from inside(item, name)

    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            for name, value in list(module.__dict__.items()):
                if type(value) in _CONTAINERS:
                    yield from inside(value, f"{path}.{name}" if path else name)


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that `model` holds, also in lists and dicts."""
    for _, tensor in tensors_of(model):
        yield tensor
    for container, _ in containers_of(model):
        for value in container.values() if isinstance(container, dict) else container:
            if isinstance(value, Tensor):
                yield value


def seed_torch(seed: int) -> None:
    """Seed torch's generators of the devices in use: of others it would keep the call with its stack, for later."""
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    torch.default_generator.manual_seed(seed)


def random_state() -> Any:
    """The state of Python's generator of random numbers and of numpy's, where that is imported."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def set_random_state(state: Any) -> None:
    random.setstate(state[0])
    numpy = sys.modules.get("numpy")
    if numpy is not None and state[1] is not None:
        numpy.random.set_state(state[1])


def same_random_state(one: Any, other: Any) -> bool:
    """Whether no number was drawn between two states."""
    if one[1] is None or other[1] is None:
        return bool(one[0] == other[0])
    return bool(one[0] == other[0]) and one[1][2] == other[1][2] and one[1][1].tobytes() == other[1][1].tobytes()


def _items(container: Any) -> list[Any]:
    return list(container.items()) if isinstance(container, dict) else list(container)


def _put_back(container: Any, items: list[Any]) -> None:
    now = _items(container)
    if isinstance(container, dict):
        same = all(a[0] is b[0] and a[1] is b[1] for a, b in zip(now, items, strict=False))
    else:
        same = all(a is b for a, b in zip(now, items, strict=False))
    if same and len(now) == len(items):
        return
    container.clear()
    if isinstance(container, list | deque):
        container.extend(items)
    elif isinstance(container, Counter):
        container.update(dict(items))
    else:
        container.update(items)


def _loose(model: nn.Module) -> Iterator[Tensor]:
    """Buffers and tensors that are plain attributes, or in lists and dicts."""
    for tensor in {id(tensor): tensor for tensor in held_tensors(model)}.values():
        dense = tensor.layout == torch.strided
        if dense and not isinstance(tensor, nn.Parameter) and tensor.numel() * tensor.element_size() <= _COPIED_BYTES:
            yield tensor
