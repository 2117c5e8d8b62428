"""SGD and AdamW over torch's fused kernels: constructing a `torch.optim` class imports torch._dynamo (+73 MB).

Parameters are updated one at a time, in one pass over memory and without temporaries, and each gradient is dropped as
soon as it is used. What the kernels cannot take (complex numbers, half precision under SGD, a gradient of another dtype
or memory order than its parameter, a device that is neither CPU nor CUDA) goes through torch's functional forms: AdamW
then holds up to two temporaries of that parameter's size, which no plan counts. As a last resort gradients and state
wait on disk (spill).
"""

import math
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from ondevice_trgl.errors import NonFiniteError
from ondevice_trgl.trgl.spill import Spill, is_spillable, squared_norm

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)
"""Of which torch's fused SGD on a CPU moves the momentum, and not the parameter, but for the last few elements."""
_DEVICES = ("cpu", "cuda")
_ORDERS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


class Optimizer:
    """Updates `parameters` (by name). Weight decay spares norms and biases (fewer than two dimensions).

    With `clip_norm` all gradients of a step are scaled down together where their common norm is larger, as
    `torch.nn.utils.clip_grad_norm_` does. Memory: none.
    """

    def __init__(
        self,
        kind: str,
        parameters: dict[str, nn.Parameter],
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        self.kind, self.parameters = kind, parameters
        self.momentum, self.weight_decay, self.clip_norm = momentum, weight_decay, clip_norm
        self._scale: float | None = None
        """What the gradients of the step that was begun are scaled by; those in memory are so already."""
        self._state: dict[str, Tensor] = {}
        self._spill: Spill | None = None
        self.wrote: Callable[[int], None] = lambda size: None
        """Told of the bytes of every write to disk."""

    @property
    def state(self) -> dict[str, Tensor]:
        """Tensors by `what.parameter`: momentum.*, or mean.*, square.*, steps.*"""
        return self._state if self._spill is None else {**self._state, **self._spill.state()}

    def spill(self, folder: Path) -> None:
        """From now on gradients and state of large parameters wait in a file in `folder`. Raises StorageError.

        Memory: of those, one gradient at a time and some megabytes. Slower by what the disk takes.
        """
        if self._spill is not None:
            return
        large = {name: parameter for name, parameter in self.parameters.items() if is_spillable(parameter)}
        self._spill = Spill(folder, large, self._kinds, self.wrote)
        self._closing = weakref.finalize(self, self._spill.close)  # hooks of a run that failed must not stay
        self.load(self._state)

    def close(self) -> None:
        """Take hooks and file away, if there are any; the parameters stay."""
        if self._spill is not None:
            self._closing()
            self._spill = None

    def _in_memory(self) -> dict[str, nn.Parameter]:
        spilled = self._spill.parameters if self._spill is not None else {}
        return {name: parameter for name, parameter in self.parameters.items() if name not in spilled}

    def allocate(self) -> None:
        """Make the state now that the first step would make: from then on every step takes the same memory."""
        if self.kind == "adamw":
            for name in self._spill.parameters if self._spill is not None else ():
                self._state.setdefault(f"steps.{name}", torch.zeros((), dtype=torch.float32))
        for name, parameter in self._in_memory().items():
            if self.kind == "adamw" and f"mean.{name}" not in self._state:
                self._state[f"mean.{name}"] = torch.zeros_like(parameter)
                self._state[f"square.{name}"] = torch.zeros_like(parameter)
                self._state[f"steps.{name}"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            elif self.kind == "sgd" and self.momentum and f"momentum.{name}" not in self._state:
                self._state[f"momentum.{name}"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, in place, then drop that gradient.

        Where memory for a parameter is lacking, which the fused kernels never need, this raises with those behind it as
        they were, their gradients kept: a second call goes on with the one that it stopped at. With `clip_norm`,
        NonFiniteError, nothing changed and the gradients dropped, where their norm is NaN or infinite.
        """
        self.allocate()
        if self.clip_norm is not None and self._scale is None:
            self._scale = self._clip(self.clip_norm)
        for name, parameter in self._in_memory().items():
            gradient = parameter.grad
            if gradient is None:
                continue
            state = [self._state[f"{kind}.{name}"] for kind in self._kinds]
            self._advance(name)
            self._change(name, lr, parameter, gradient, *state)
            parameter.grad = None
        for name in self._spill.parameters if self._spill is not None else ():
            assert self._spill is not None
            if self._spill.has_gradient(name):
                self._advance(name)
                self._spill.update(name, partial(self._change_read, name, lr))
        self._scale = None

    def _clip(self, most: float) -> float:
        """Scale gradients in memory so that the norm of all, those in the file included, is `most` at the highest."""
        here = [parameter.grad for parameter in self._in_memory().values() if parameter.grad is not None]
        squares = [squared_norm(gradient) for gradient in here]
        if self._spill is not None:
            squares += [self._spill.squared_norm(name) for name in self._spill.parameters if self._has_spilled(name)]
        norm = math.sqrt(sum(sorted(squares)))  # in whatever order: it is the same where some are in the file
        if not math.isfinite(norm):
            self.drop_gradients()
            raise NonFiniteError(f"the norm of the gradients is {norm}")
        scale = min(1.0, most / (norm + 1e-6))
        if scale < 1.0:
            for gradient in here:
                gradient.mul_(scale)
        return scale

    def _has_spilled(self, name: str) -> bool:
        return self._spill is not None and self._spill.has_gradient(name)

    def _change_read(self, name: str, lr: float, parameter: Tensor, gradient: Tensor, *state: Tensor) -> None:
        """`_change` of a chunk whose gradient was just read from the file."""
        if self._scale is not None and self._scale < 1.0:
            gradient.mul_(self._scale)
        self._change(name, lr, parameter, gradient, *state)

    @property
    def _kinds(self) -> tuple[str, ...]:
        return ("mean", "square") if self.kind == "adamw" else ("momentum",) if self.momentum else ()

    def _advance(self, name: str) -> None:
        if self.kind == "adamw":
            self._state[f"steps.{name}"].add_(1)

    def _change(self, name: str, lr: float, parameter: Tensor, gradient: Tensor, *state: Tensor) -> None:
        """Update `parameter`, or a chunk of that which is called `name`."""
        decay = self.weight_decay if self.parameters[name].ndim >= 2 else 0.0
        if self.kind == "sgd":
            self._sgd(parameter, gradient, [*state], lr, decay)
        else:
            mean, square = state
            self._adamw(parameter, gradient, mean, square, self._state[f"steps.{name}"], lr, decay)

    def _sgd(self, parameter: Tensor, gradient: Tensor, state: list[Tensor], lr: float, decay: float) -> None:
        if parameter.dtype not in _HALVES and _is_fusable(parameter, gradient, *state):
            torch._fused_sgd_(
                [parameter], [gradient], state,
                lr=lr, momentum=self.momentum, weight_decay=decay,
                dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
            )  # fmt: skip
            return
        if decay:
            gradient.add_(parameter, alpha=decay)  # in place: the functional form would hold a copy
        sgd(
            [parameter], [gradient], [*state] or [None],
            lr=lr, momentum=self.momentum, weight_decay=0.0,
            dampening=0.0, nesterov=False, maximize=False, foreach=False,
        )  # fmt: skip

    def _adamw(
        self, parameter: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, steps: Tensor, lr: float, decay: float
    ) -> None:
        if _is_fusable(parameter, gradient, mean, square):
            torch._fused_adamw_(
                [parameter], [gradient], [mean], [square], [], [steps],
                lr=lr, beta1=0.9, beta2=0.999, weight_decay=decay, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip
            return
        adamw(
            [parameter], [gradient], [mean], [square], [], [steps - 1],  # which it counts up itself
            lr=lr, beta1=0.9, beta2=0.999, weight_decay=decay, eps=1e-8, amsgrad=False, maximize=False, foreach=False,
        )  # fmt: skip

    def takes(self, name: str, tensor: Tensor) -> bool:
        """Whether `tensor` is, by its name and form, part of the state that is saved of this optimizer."""
        kind, _, of = name.partition(".")
        if kind == "steps" and self.kind == "adamw":
            return of in self.parameters and tensor.shape == () and tensor.dtype == torch.float32
        like = self.parameters.get(of)
        return kind in self._kinds and like is not None and (tensor.shape, tensor.dtype) == (like.shape, like.dtype)

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over `state` as it was saved."""
        self._state = dict(state)
        if self._spill is not None:
            for name in self._spill.parameters:
                for kind in self._kinds:
                    if (values := self._state.pop(f"{kind}.{name}", None)) is not None:
                        self._spill.put(name, kind, values)

    def drop_gradients(self) -> None:
        """Set every gradient to None: gives its memory back."""
        if self._spill is not None:
            self._spill.drop_gradients()
        self._scale = None
        for parameter in self.parameters.values():
            parameter.grad = None

    @staticmethod
    def state_bytes(kind: str, parameter_bytes: int, momentum: float) -> int:
        """Bytes of state that `kind` keeps for parameters of `parameter_bytes`."""
        return {"sgd": parameter_bytes if momentum else 0, "adamw": 2 * parameter_bytes}[kind]


def _is_fusable(*tensors: Tensor) -> bool:
    """Whether the fused kernels can walk these side by side: they take memory as it lies, and check no strides."""
    return (
        all(t.dtype in _DTYPES and t.dtype == tensors[0].dtype and t.device.type in _DEVICES for t in tensors)
    ) and any(all(t.is_contiguous(memory_format=order) for t in tensors) for order in _ORDERS)
