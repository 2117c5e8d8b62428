"""What a rehearsal plays with: one module of a plan, noise in place of data, one sweep."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ondevice_trgl.model.partition import LocalModule, Partition
from ondevice_trgl.plan.breakdown import Breakdown
from ondevice_trgl.plan.costs import Costs
from ondevice_trgl.plan.plan import Plan, Rung
from ondevice_trgl.run.boundaries import Boundaries
from ondevice_trgl.run.budget import Budget
from ondevice_trgl.run.progress import Progress
from ondevice_trgl.run.stepper import Stepper
from ondevice_trgl.run.sweep import sweep


class Noise:
    """Samples of a shape, one for each of `labels`."""

    def __init__(self, shape: tuple[int, ...], labels: Tensor) -> None:
        self.shape, self.labels = shape, labels

    def read(self, indices: Sequence[int], out: Tensor) -> Tensor:
        part = out[: len(indices)]
        if out.is_floating_point():
            part.normal_()
        return self.labels[list(indices)]


@dataclass(frozen=True)
class Scene:
    """Module `index` of a plan."""

    partition: Partition
    index: int
    plan: Plan
    costs: Costs

    @property
    def module(self) -> LocalModule:
        return self.partition.modules[self.index]

    @property
    def is_last(self) -> bool:
        return self.index == self.plan.num_parts - 1

    @property
    def span(self) -> tuple[int, int]:
        """Its segments: first, and behind the last."""
        return self.plan.bounds[self.index], self.plan.bounds[self.index + 1]

    def tensors(self, rung: Rung, *, accumulate: bool) -> Breakdown:
        """What its tensors take on `rung`."""
        return self.costs.tensors(
            *self.span,
            rung.micro_batch_size,
            accumulate=accumulate,
            checkpointed=rung.checkpointed,
            spilled=rung.spilled,
        )


def sweep_once(
    stepper: Stepper, boundaries: Boundaries, module: LocalModule, device: torch.device, budget: Budget, *, write: bool
) -> None:
    progress = Progress(
        run_dir=Path(), budget_bytes=budget.bytes, laps=1, num_modules=1, lengths=(1,), steps=1, callbacks=()
    )
    sweep(stepper.objective, stepper.buffer, boundaries, progress, module, device, budget, write=write)
