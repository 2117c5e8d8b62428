"""The multiplier variant of the objective, which weighs transport and task against each other by itself (Uzawa).

loss = task loss + (1 / lambda) · transport cost; every s steps lambda <- lambda + h · task loss of that step
(arXiv 2309.17357, Uzawa's method; the published run: lambda_0 = 1, h = 1, s = 50). Every module starts at the same
lambda_0 in each lap, and carries on over its epochs.
"""

from dataclasses import dataclass

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import NonFiniteError


@dataclass
class Multiplier:
    """lambda of one module: `value` now, moved by `rate` times the task loss every `every` steps."""

    value: float
    rate: float
    every: int

    @classmethod
    def of(cls, config: TrainConfig, value: float | None = None) -> "Multiplier | None":
        """What `config` asks for, at `value` or at its start; None where the weight is 1 / (2 tau)."""
        if config.tau != "multiplier":
            return None
        return cls(config.multiplier_start if value is None else value, config.multiplier_rate, config.multiplier_every)

    @property
    def weight(self) -> float:
        """Of the transport cost: 1 / lambda."""
        return 1.0 / self.value

    def after(self, steps: int, task_loss: float) -> None:
        """Move on when `steps` of the module's steps in this lap are done, the last at the mean loss `task_loss`.

        Raises NonFiniteError where a loss below 0 would bring lambda to 0 or below.
        """
        if steps % self.every:
            return
        value = self.value + self.rate * task_loss
        if value <= 0.0:
            raise NonFiniteError(
                f"the multiplier would be {value:g}: the task loss is {task_loss:g}, which may not be negative here",
                hint="start again with a number for --tau",
            )
        self.value = value
