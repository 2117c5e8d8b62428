"""How parameters are updated and at which learning rates: the part of `TrainConfig` that optimizers ask for."""

import math
from dataclasses import dataclass

from ondevice_trgl import checks
from ondevice_trgl.checks import Checked, setting

OPTIMIZERS = ("sgd", "adamw")
LR_SCHEDULES = ("cosine", "constant", "step")
MOST_WARMUP = 0.9


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Checked):
    """The optimizer and its learning rate over a module's steps in a lap."""

    optimizer: str = setting("sgd", checks.one_of(*OPTIMIZERS))
    lr: float | None = setting(None, checks.number(0.0, math.inf, open_below=True, words=(None,)))
    """Learning rate; None is 0.05 for sgd and 0.001 for adamw."""
    lr_schedule: str = setting("cosine", checks.one_of(*LR_SCHEDULES))
    """Over the epochs of one module in one lap: cosine falls to zero, constant stays, step falls at `lr_steps`."""
    lr_steps: tuple[float, ...] | None = setting(None, checks.shares)
    """Where step falls, as shares of a module's steps in a lap; None is (0.5, 0.75)."""
    lr_gamma: float | None = setting(None, checks.number(0.0, 1.0, open_below=True, words=(None,)))
    """What the rate is multiplied by at each of those; None is 0.1."""
    warmup: float = setting(0.0, checks.number(0.0, MOST_WARMUP))
    """Share of a module's steps in a lap over which the rate rises in a line from a hundredth; cosine begins behind."""
    momentum: float = setting(0.9, checks.number(0.0, 1.0))
    weight_decay: float = setting(2e-4, checks.number(0.0, math.inf))
    clip_norm: float | None = setting(None, checks.number(0.0, math.inf, open_below=True, words=(None,)))
    """Most that the norm of all gradients of a module's step may be; larger ones are scaled down to it."""

    def rate_faults(self) -> list[str]:
        """Settings that the schedule of the learning rate has no use for."""
        return [
            f"{name} = {checks.plain(value)}: lr_schedule = {self.lr_schedule!r} has none; set 'step'"
            for name in ("lr_steps", "lr_gamma")
            if self.lr_schedule != "step" and (value := getattr(self, name)) is not None
        ]

    @property
    def learning_rate(self) -> float:
        """The learning rate that a module starts with."""
        return self.lr if self.lr is not None else {"sgd": 0.05, "adamw": 0.001}[self.optimizer]

    def learning_rate_at(self, done: float) -> float:
        """The learning rate when the share `done` (0 to 1) of a module's steps in a lap is behind it."""
        if done < self.warmup:
            return self.learning_rate * (0.01 + 0.99 * done / self.warmup)
        if self.lr_schedule == "constant":
            return self.learning_rate
        if self.lr_schedule == "step":
            gamma = 0.1 if self.lr_gamma is None else self.lr_gamma
            return self.learning_rate * gamma ** sum(done >= share for share in self.lr_steps or (0.5, 0.75))
        done = (done - self.warmup) / (1.0 - self.warmup)
        return 0.5 * self.learning_rate * (1.0 + math.cos(math.pi * done))
