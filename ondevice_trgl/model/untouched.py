"""A network left as it was, whatever its forward passes do: modes, buffers, attributes, gradients, random numbers."""

import contextlib
import random
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ondevice_trgl.model.store import tensors_of

_COPIED_BYTES = 1 << 20
"""A tensor that is no parameter and no larger is put back by value where it changed."""


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts back what runs inside: what modules hold, values of buffers, and the state of random number generators.

    Parameters are not copied: what no forward pass should change. Memory: copies of the buffers.
    """
    modules = list(model.modules())
    held = [dict(module.__dict__) for module in modules]
    tables = [{name: dict(module.__dict__[name]) for name in _TABLES} for module in modules]
    values = [(tensor, tensor.detach().clone()) for tensor in _loose(model)]
    gradients = [(p, p.grad) for p in model.parameters()]
    numpy = sys.modules.get("numpy")
    numbers = torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        for module, before, inside in zip(modules, held, tables, strict=True):
            module.__dict__.clear()
            module.__dict__.update(before)
            for name, table in inside.items():
                module.__dict__[name].clear()
                module.__dict__[name].update(table)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):  # a norm moves its statistics without a trace in `_version`
                    tensor.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        torch.set_rng_state(numbers[0])
        random.setstate(numbers[1])
        if numpy is not None and numbers[2] is not None:
            numpy.random.set_state(numbers[2])


_TABLES = ("_parameters", "_buffers", "_modules")


def _loose(model: nn.Module) -> Iterator[Tensor]:
    """Buffers and tensors that are plain attributes."""
    for _, tensor in tensors_of(model):
        if not isinstance(tensor, nn.Parameter) and tensor.numel() * tensor.element_size() <= _COPIED_BYTES:
            yield tensor
