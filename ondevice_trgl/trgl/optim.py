"""SGD and AdamW over torch's fused kernels: constructing a `torch.optim` class imports torch._dynamo (+73 MB).

Parameters are updated one at a time, in one pass over memory and without temporaries, and each gradient is dropped as
soon as it is used. What the kernels cannot take (complex numbers, a gradient of another dtype or memory order than its
parameter, a device that is neither CPU nor CUDA) goes through torch's functional forms: AdamW then holds up to two
temporaries of that parameter's size, which no plan counts.
"""

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda")
_ORDERS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


class Optimizer:
    """Updates `parameters` (by name). Weight decay spares norms and biases (fewer than two dimensions)."""

    def __init__(
        self, kind: str, parameters: dict[str, nn.Parameter], *, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        self.kind, self.parameters = kind, parameters
        self.momentum, self.weight_decay = momentum, weight_decay
        self.state: dict[str, Tensor] = {}
        """Tensors by `what.parameter`: momentum.*, or mean.*, square.*, steps.*"""

    def allocate(self) -> None:
        """Make the state now that the first step would make: from then on every step takes the same memory."""
        for name, parameter in self.parameters.items():
            if self.kind == "adamw" and f"mean.{name}" not in self.state:
                self.state[f"mean.{name}"] = torch.zeros_like(parameter)
                self.state[f"square.{name}"] = torch.zeros_like(parameter)
                self.state[f"steps.{name}"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            elif self.kind == "sgd" and self.momentum and f"momentum.{name}" not in self.state:
                self.state[f"momentum.{name}"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, in place, then drop that gradient.

        Where memory for a parameter is lacking, which the fused kernels never need, this raises with those behind it as
        they were, their gradients kept: a second call goes on with the one that it stopped at.
        """
        self.allocate()
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            decay = self.weight_decay if parameter.ndim >= 2 else 0.0
            if self.kind == "sgd":
                self._sgd(name, parameter, gradient, lr, decay)
            else:
                self._adamw(name, parameter, gradient, lr, decay)
            parameter.grad = None

    def _sgd(self, name: str, parameter: Tensor, gradient: Tensor, lr: float, decay: float) -> None:
        state = [self.state[f"momentum.{name}"]] if self.momentum else []
        if _is_fusable(parameter, gradient, *state):
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

    def _adamw(self, name: str, parameter: Tensor, gradient: Tensor, lr: float, decay: float) -> None:
        mean, square, steps = (self.state[f"{what}.{name}"] for what in ("mean", "square", "steps"))
        if _is_fusable(parameter, gradient, mean, square):
            steps.add_(1)
            torch._fused_adamw_(
                [parameter], [gradient], [mean], [square], [], [steps],
                lr=lr, beta1=0.9, beta2=0.999, weight_decay=decay, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip
            return
        adamw(
            [parameter], [gradient], [mean], [square], [], [steps],
            lr=lr, beta1=0.9, beta2=0.999, weight_decay=decay, eps=1e-8, amsgrad=False, maximize=False, foreach=False,
        )  # fmt: skip

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over `state` as it was saved."""
        self.state = dict(state)

    def drop_gradients(self) -> None:
        """Set every gradient to None: gives its memory back."""
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
