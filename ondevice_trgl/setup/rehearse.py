"""Rehearsal: a module of the plan trained for one step on noise and swept once, and what that took.

The same steps, cache and limit as in the run, so that the figure is what the run will measure. Where it does not fit,
the plan is made anew with what was learned.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.limit import MemoryLimit
from ondevice_trgl.device.meter import PeakMeter, RssMeter
from ondevice_trgl.errors import BudgetExceededError
from ondevice_trgl.model.alike import likeness
from ondevice_trgl.model.heads import build_head
from ondevice_trgl.model.partition import LocalModule, Partition, group
from ondevice_trgl.model.store import evict, fill_with_noise, is_evicted
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.plan.memo import Memo
from ondevice_trgl.plan.plan import Plan, Rung
from ondevice_trgl.run.boundaries import Boundaries
from ondevice_trgl.run.budget import Budget
from ondevice_trgl.run.progress import Progress
from ondevice_trgl.run.stepper import Pressure, Stepper
from ondevice_trgl.run.sweep import sweep
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.trgl.step import Objective

MARGIN = 1.01
"""The run has its callbacks, and a history: what is measured is taken this much larger."""
REFUSED = 1.03
"""What did not fit is taken to need this much more than there was."""


class _Noise:
    """As many samples of a shape as are asked for."""

    def __init__(self, shape: tuple[int, ...], rows: int, classes: int) -> None:
        self.shape = shape
        self.labels = torch.arange(rows) % classes

    def read(self, indices: Sequence[int], out: Tensor) -> Tensor:
        part = out[: len(indices)]
        if out.is_floating_point():
            part.normal_()
        return self.labels[list(indices)]


class Rehearsals:
    """Runs modules of plans, and remembers what they took. The tensors of `chain` must be evicted.

    `room_bytes` is what this process may take, `scratch` a folder on the disk of the cache.
    """

    def __init__(
        self,
        chain: Chain,
        config: TrainConfig,
        meter: PeakMeter,
        limit: MemoryLimit,
        memo: Memo,
        *,
        room_bytes: int,
        scratch: Path,
    ) -> None:
        self._chain, self._config, self._meter, self._limit, self._memo = chain, config, meter, limit, memo
        self._room, self._scratch = room_bytes, scratch
        self.possible = meter.name == RssMeter.name and is_evicted(chain.model)
        self._budget = Budget(room_bytes, limit, meter)
        self._budget.make_room()
        self.floor_bytes = meter.current_bytes() if meter.kind == "rss" else 0
        """What this process holds before the first module."""
        self.above: dict[tuple[int, int, int, bool], int] = {}
        """(start, stop, micro-batch, checkpointed) -> peak above the floor, in bytes."""

    def end(self) -> None:
        """Put back the limit that was there before."""
        self._budget.end()

    def of(self, plan: Plan) -> bool:
        """Measure the modules of `plan` that are not known, the largest first; False as soon as one does not fit."""
        partition = group(self._chain, plan.bounds)
        most = plan.budget_bytes - plan.floor_bytes
        for index in sorted(range(plan.num_modules), key=lambda k: -plan.rungs[k].peak_bytes):
            rung = plan.rungs[index]
            key = (plan.bounds[index], plan.bounds[index + 1], rung.micro_batch_size, rung.checkpointed)
            if key not in self.above:
                above = self._known_or_measured(partition, index, plan, rung, most)
                if above is None:
                    continue
                self.above[key] = above
            if self.above[key] > most:
                return False
        return True

    def _known_or_measured(self, partition: Partition, index: int, plan: Plan, rung: Rung, most: int) -> int | None:
        module, settings = partition.modules[index], dataclasses.asdict(self._config)
        key = {
            **{name: settings[name] for name in ("tau", "transport", "head", "optimizer", "momentum", "device")},
            "micro_batch": rung.micro_batch_size,
            "checkpointed": rung.checkpointed,
            "accumulated": rung.micro_batch_size < plan.batch_size,
            "cache": [plan.cache_tier, plan.cache_dtype],
            "last": index == plan.num_modules - 1,
            "classes": self._chain.num_outputs,
        }
        alike = likeness(module)
        known = self._memo.get("rehearsal", alike, **key)
        if known is None and not self.possible:
            return None
        if known is None:
            measured = self._measure(partition, index, plan, rung, most)
            if measured is None:  # how much more it would have taken nobody knows
                return int(REFUSED * most)
            known = MARGIN * measured
            self._memo.put("rehearsal", alike, known, **key)
        return int(known)

    def _measure(self, partition: Partition, index: int, plan: Plan, rung: Rung, most: int) -> int | None:
        """Peak above the floor; None where the limit refused it."""
        budget, meter = self._budget, self._meter
        budget.make_room()
        budget.bytes = min(self._room, self.floor_bytes + most)
        budget.enforce()
        meter.reset()
        module = partition.modules[index]
        fill_with_noise(module)
        try:
            self._train_and_sweep(partition, index, plan, rung, budget)
        except BudgetExceededError:
            return None
        finally:
            peak = meter.peak_bytes()
            evict(module)
            budget.bytes = self._room
            budget.make_room()
        return peak - self.floor_bytes

    def _train_and_sweep(self, partition: Partition, index: int, plan: Plan, rung: Rung, budget: Budget) -> None:
        config, module = self._config, partition.modules[index]
        last = index == plan.num_modules - 1
        head = None if last else build_head(config.head, module.out_shape, self._chain.num_outputs)

        def objective(rung: Rung) -> Objective:
            return Objective(
                module,
                head,
                tau=config.tau_value,
                transport=config.transport,
                transport_norm=config.transport_norm,
                label_smoothing=config.label_smoothing,
                pieces=partition.pieces(index) if rung.checkpointed else (),
            )

        device = torch.device("cpu")
        stepper = Stepper(
            objective,
            Optimizer(
                config.optimizer,
                objective(rung).parameters(),
                momentum=config.momentum,
                weight_decay=config.weight_decay,
            ),
            (rung,),
            rung,
            batch_size=min(plan.batch_size, 2 * rung.micro_batch_size),  # of several micro-batches two show all
            in_shape=module.in_shape,
            in_dtype=self._chain.in_dtype if index == 0 else torch.float32,
            device=device,
            budget=budget,
            notify=_unheard,
        )
        noise = _Noise(module.in_shape, plan.batch_size, self._chain.num_outputs)
        stepper.objective.train_mode(True)
        stepper.step(noise, range(min(plan.batch_size, 2 * rung.micro_batch_size)), 1e-6)
        with tempfile.TemporaryDirectory(prefix="boundary-", dir=self._scratch) as folder:
            boundaries = Boundaries({"train": noise}, plan.cache_tier, plan.cache_dtype, Path(folder))
            noise.labels = noise.labels[: rung.micro_batch_size]
            try:
                _sweep_once(stepper, boundaries, module, device, budget, write=not last)
            finally:
                boundaries.close()


def _sweep_once(
    stepper: Stepper, boundaries: Boundaries, module: LocalModule, device: torch.device, budget: Budget, *, write: bool
) -> None:
    progress = Progress(
        run_dir=Path(), budget_bytes=budget.bytes, laps=1, num_modules=1, epochs=1, steps=1, callbacks=()
    )
    sweep(stepper.objective, stepper.buffer, boundaries, progress, module, device, budget, write=write)


def _unheard(pressure: Pressure, rung: Rung) -> None:
    """A rehearsal has nobody to tell."""
