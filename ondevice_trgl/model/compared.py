"""Tensors of two runs compared, by some of their elements where they are large."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ondevice_trgl.model.trace import Chain

_SAMPLES = 1024
"""Elements of a large tensor that are compared, at even distances."""
_CLOSE = 1e-3
"""Of a tensor's largest element: the same operators in the same order differ by far less."""


def sample(tensor: Tensor) -> Tensor:
    """Some elements of `tensor`, as float32."""
    values = tensor.detach().coalesce().values() if tensor.is_sparse else tensor.detach()
    flat = values.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].float().clone()


def glimpse(tensor: Tensor) -> Tensor:
    """A few neighbouring elements: of a tensor in a file, little comes into memory."""
    flat = tensor.detach().reshape(-1)
    return flat[flat.numel() // 2 :][:64].clone()


def close(got: Tensor, wanted: Tensor, least: float = 1e-7) -> bool:
    if got.shape != wanted.shape:
        return False
    known = wanted[wanted.isfinite()].abs()
    most = float(known.max()) if known.numel() else 0.0
    return torch.allclose(got.float(), wanted.float(), rtol=0.0, atol=_CLOSE * most + least, equal_nan=True)


def leaves_of(output: Tensor, seen: set[Any]) -> list[Tensor]:
    """The tensors whose gradient a backward pass from `output` computes, but for those behind what was `seen` before.

    Adds to `seen`, which holds None at least.
    """
    found: list[Tensor] = []
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        if isinstance(variable := getattr(node, "variable", None), Tensor):
            found.append(variable)  # also where it was found before: it may be used in two places
            continue
        seen.add(node)
        waiting += [inner for inner, _ in node.next_functions]
    return found


@contextlib.contextmanager
def watched(chain: Chain) -> Iterator[list[tuple[str, Tensor]]]:
    """Samples of what the layers put out that the chain calls, in order."""
    seen: list[tuple[str, Tensor]] = []

    def watch(path: str) -> Callable[..., None]:
        def ran(layer: nn.Module, args: Any, result: Any) -> None:
            if isinstance(result, Tensor):
                seen.append((path, sample(result)))

        return ran

    paths = {str(node.target) for node in chain.graph.nodes if node.op == "call_module"}
    handles = [chain.root.get_submodule(path).register_forward_hook(watch(path)) for path in sorted(paths)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
