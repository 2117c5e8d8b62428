"""How many bytes of tensors are alive, and were at most, while a piece of code runs."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators allocate under it, until they are freed.

    Storages that were there before do not count; nor does what a kernel allocates for itself.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the default wraps the hook in torch._dynamo, whose import costs 73 MB

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self.timeline: list[int] = []
        """`current` after each operator."""
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes and key not in before:
                    self._sizes[key] = storage.nbytes()
                    self.current += storage.nbytes()
                    weakref.finalize(storage, self._freed, key)
        self.peak = max(self.peak, self.current)
        self.timeline.append(self.current)
        return result

    def _freed(self, key: int) -> None:
        self.current -= self._sizes.pop(key, 0)

    def restart(self) -> None:
        """From now on, `peak` is the most from here, and `timeline` starts here."""
        self.peak = self.current
        self.timeline = [self.current]


class _Seed(torch.autograd.Function):
    """A scalar whose gradient with respect to `out` is all ones; does not keep `out`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        ctx.like = out.shape, out.dtype, out.device
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        shape, dtype, device = ctx.like
        return torch.ones(shape, dtype=dtype, device=device)


def seed(out: Tensor) -> Tensor:
    """A scalar to start a backward pass from, whose incoming gradient at `out` is a tensor of its own."""
    result: Tensor = _Seed.apply(out)  # type: ignore[no-untyped-call]
    return result
