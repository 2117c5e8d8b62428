"""SGD and AdamW over torch's functional forms: constructing a `torch.optim` class imports torch._dynamo (+73 MB).

Parameters are updated one at a time and each gradient is dropped as soon as it is used, so that the update holds at
most one parameter's worth of temporaries.
"""

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd


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
                self.state[f"steps.{name}"] = torch.zeros((), dtype=torch.float32)
            elif self.kind == "sgd" and self.momentum and f"momentum.{name}" not in self.state:
                self.state[f"momentum.{name}"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, then drop that gradient.

        Where memory for a parameter is lacking, this raises with that parameter and those behind it as they were, their
        gradients kept: a second call goes on there.
        """
        self.allocate()
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            if self.kind == "adamw":
                _reserve(parameter)
            parameter.grad = None
            decay = self.weight_decay if parameter.ndim >= 2 else 0.0
            if self.kind == "sgd":
                self._sgd(name, parameter, gradient, lr, decay)
            else:
                self._adamw(name, parameter, gradient, lr, decay)

    def _sgd(self, name: str, parameter: Tensor, gradient: Tensor, lr: float, decay: float) -> None:
        if decay:
            gradient.add_(parameter, alpha=decay)  # in place: the functional form would hold a copy
        buffers = [self.state.get(f"momentum.{name}")]
        sgd(
            [parameter],
            [gradient],
            buffers,
            foreach=False,
            weight_decay=0.0,
            momentum=self.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )

    def _adamw(self, name: str, parameter: Tensor, gradient: Tensor, lr: float, decay: float) -> None:
        adamw(
            [parameter],
            [gradient],
            [self.state[f"mean.{name}"]],
            [self.state[f"square.{name}"]],
            [],
            [self.state[f"steps.{name}"]],
            foreach=False,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=lr,
            weight_decay=decay,
            eps=1e-8,
            maximize=False,
        )

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over `state` as it was saved."""
        self.state = dict(state)

    def drop_gradients(self) -> None:
        """Set every gradient to None: gives its memory back."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @staticmethod
    def update_bytes(kind: str, parameter_bytes: int) -> int:
        """Bytes of temporaries while one parameter of `parameter_bytes` is updated."""
        return {"sgd": 0, "adamw": 2 * parameter_bytes}[kind]

    @staticmethod
    def state_bytes(kind: str, parameter_bytes: int, momentum: float) -> int:
        """Bytes of state that `kind` keeps for parameters of `parameter_bytes`."""
        return {"sgd": parameter_bytes if momentum else 0, "adamw": 2 * parameter_bytes}[kind]


def _reserve(parameter: Tensor) -> None:
    """Take the memory of an update's temporaries and give it back: if it is lacking, then before anything changes."""
    taken = [torch.empty_like(parameter) for _ in range(2)]
    del taken
