"""Gradients and optimizer state of large parameters in a file, some megabytes of them in memory at a time.

The last resort where weights fit and three or four times the weights do not. A gradient goes to the file as soon as
autograd has it; the update walks parameter, gradient and state chunk by chunk. Until all gradients are there nothing is
changed, so that a step can still be undone.
"""

import contextlib
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.errors import StorageError
from ondevice_trgl.units import format_size

SMALLEST_BYTES = 256 << 10
"""A parameter below this keeps gradient and state in memory."""
CHUNK_ELEMENTS = 1 << 20
_GRADIENT = "gradient"


def is_spillable(parameter: Tensor) -> bool:
    """Whether its gradient and state can wait in a file."""
    size = parameter.numel() * parameter.element_size()
    return parameter.requires_grad and parameter.device.type == "cpu" and size >= SMALLEST_BYTES and is_dense(parameter)


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one stretch of memory, in whatever order."""
    orders = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
    return any(
        tensor.is_contiguous(memory_format=order)
        for order in orders
        if tensor.ndim == {torch.channels_last: 4, torch.channels_last_3d: 5}.get(order, tensor.ndim)
    )


class Spill:
    """A file in `folder`, gone with this object, that holds one gradient and `kinds` of state for each parameter.

    Takes every gradient out of memory as soon as it is there. `wrote` is told of the bytes of every write.
    Raises StorageError where the disk has no room.
    """

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, nn.Parameter],
        kinds: tuple[str, ...],
        wrote: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.parameters, self.kinds, self._wrote = dict(parameters), kinds, wrote
        self._offsets: dict[tuple[str, str], int] = {}
        self._there: set[str] = set()
        """Parameters that have a gradient in the file."""
        size = 0
        for name, parameter in self.parameters.items():
            for kind in (_GRADIENT, *kinds):
                self._offsets[name, kind] = size
                size += -(-parameter.numel() * parameter.element_size() // 64) * 64
        self._size = size
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as undo:
                self._file = undo.enter_context(tempfile.TemporaryFile(dir=folder, prefix="optimizer-", buffering=0))
                os.ftruncate(self._file.fileno(), size)
                if hasattr(os, "posix_fallocate") and size:
                    os.posix_fallocate(self._file.fileno(), 0, size)
                undo.pop_all()
        except OSError as error:
            raise StorageError(
                f"cannot keep {format_size(size)} of optimizer state in {folder}: {error.strerror}",
                hint="free some disk space, or choose another --cache-dir; then resume the run",
            ) from error
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._taking(name))
            for name, parameter in self.parameters.items()
        ]

    def close(self) -> None:
        """Leave gradients in memory again, and drop the file."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._file.close()

    def _taking(self, name: str) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                self._add(name, gradient.detach())

        return take

    def _add(self, name: str, gradient: Tensor) -> None:
        """`gradient`, to what the file has of earlier micro-batches."""
        parameter = self.parameters[name]
        if gradient.stride() != parameter.stride() or gradient.dtype != parameter.dtype:
            gradient = torch.empty_like(parameter).copy_(gradient)
        flat = in_order(gradient)
        for start in range(0, flat.numel(), CHUNK_ELEMENTS):
            part = flat[start : start + CHUNK_ELEMENTS]
            if name in self._there:
                part = self._read(name, _GRADIENT, start, part.numel()).add_(part)
            self._write(name, _GRADIENT, start, part)
        self._there.add(name)

    def drop_gradients(self) -> None:
        """Forget every gradient."""
        self._there.clear()

    def has_gradient(self, name: str) -> bool:
        return name in self._there

    def squared_norm(self, name: str) -> float:
        """Sum of squares of the gradient of one parameter, as `squared_norm` of it in memory."""
        parameter = self.parameters[name]
        size = parameter.numel()
        starts = range(0, size, CHUNK_ELEMENTS)
        return math.fsum(_square(self._read(name, _GRADIENT, at, min(CHUNK_ELEMENTS, size - at))) for at in starts)

    @torch.no_grad()
    def update(self, name: str, change: Callable[..., None]) -> None:
        """`change(parameter, gradient, *state)` for every chunk of one parameter, in place; its gradient is gone then.

        All are flat views or buffers of at most `CHUNK_ELEMENTS`.
        """
        flat = in_order(self.parameters[name].data)
        for start in range(0, flat.numel(), CHUNK_ELEMENTS):
            part = flat[start : start + CHUNK_ELEMENTS]
            gradient = self._read(name, _GRADIENT, start, part.numel())
            state = [self._read(name, kind, start, part.numel()) for kind in self.kinds]
            change(part, gradient, *state)
            for kind, values in zip(self.kinds, state, strict=True):
                self._write(name, kind, start, values)
        self._there.discard(name)

    def put(self, name: str, kind: str, values: Tensor) -> None:
        """State of one parameter, as it was in memory."""
        parameter = self.parameters[name]
        if values.stride() != parameter.stride() or values.dtype != parameter.dtype:
            values = torch.empty_like(parameter).copy_(values)
        self._write(name, kind, 0, in_order(values))

    def state(self) -> dict[str, Tensor]:
        """State by `kind.parameter`: views of the file, whose pages come into memory as they are read."""
        if not self.kinds or not self._size:
            return {}
        mapped = torch.frombuffer(mmap.mmap(self._file.fileno(), self._size), dtype=torch.uint8)
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for kind in self.kinds:
                start = self._offsets[name, kind]
                block = mapped[start : start + parameter.numel() * parameter.element_size()].view(parameter.dtype)
                found[f"{kind}.{name}"] = block.as_strided(parameter.shape, parameter.stride())
        return found

    def _read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        values = torch.empty(count, dtype=self.parameters[name].dtype)
        data, position = bytes_of(values), self._offsets[name, kind] + start * values.element_size()
        while data:
            got = os.preadv(self._file.fileno(), [data], position)
            if not got:
                raise StorageError(f"optimizer state of {name} ends early", hint="resume the run")
            data, position = data[got:], position + got
        return values

    def _write(self, name: str, kind: str, start: int, values: Tensor) -> None:
        data, position = bytes_of(values), self._offsets[name, kind] + start * values.element_size()
        self._wrote(len(data))
        try:
            while data:
                written = os.pwrite(self._file.fileno(), data, position)
                data, position = data[written:], position + written
        except OSError as error:
            raise StorageError(
                f"cannot write optimizer state: {error.strerror}", hint="free some disk space; then resume the run"
            ) from error


def squared_norm(gradient: Tensor) -> float:
    """Sum of squares, chunk by chunk, so that it is the same whether the gradient waits in memory or in a file."""
    if not is_dense(gradient):
        return _square(gradient)
    return math.fsum(_square(part) for part in in_order(gradient).split(CHUNK_ELEMENTS))


def _square(part: Tensor) -> float:
    wide = torch.float32 if part.dtype in (torch.float16, torch.bfloat16) else None
    return float(torch.linalg.vector_norm(part, dtype=wide)) ** 2


def in_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory, flat, without a copy."""
    return tensor.as_strided((tensor.numel(),), (1,))
