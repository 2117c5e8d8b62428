"""What every part of a running training works with, and the few things that each of them does to a module."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.device.meter import PeakMeter
from ondevice_trgl.device.precision import autocast_dtype
from ondevice_trgl.device.randomness import Randomness, seed_all
from ondevice_trgl.model.partition import Partition
from ondevice_trgl.model.store import ModuleStore, evict
from ondevice_trgl.plan.plan import Plan, Rung
from ondevice_trgl.run.batches import buffer_for
from ondevice_trgl.run.boundaries import Boundaries
from ondevice_trgl.run.budget import Budget
from ondevice_trgl.run.progress import Progress
from ondevice_trgl.run.run_dir import RunDir
from ondevice_trgl.run.sweep import Swept, sweep
from ondevice_trgl.trgl.loss import Loss, task_loss
from ondevice_trgl.trgl.multiplier import Multiplier
from ondevice_trgl.trgl.step import Objective
from ondevice_trgl.trgl.task import Task


@dataclass(frozen=True)
class Context:
    """The parts of one sitting. Modules and heads are evicted but for those that are being worked on."""

    partition: Partition
    heads: Sequence[nn.Module | None]
    plan: Plan
    config: TrainConfig
    store: ModuleStore
    run: RunDir
    boundaries: Boundaries
    progress: Progress
    meter: PeakMeter
    device: torch.device
    budget: Budget
    task: Task
    own_code: bool = False
    """Whether layers are code of the user's, which may draw from the generators of Python and numpy."""

    def seed(self, seed: int) -> None:
        """Seed what the network may draw from; an app's other generators are its own."""
        seed_all(seed, torchs_alone=not self.own_code)

    def random_state(self) -> dict[str, Tensor]:
        """Where what the network may draw from stands, for a checkpoint."""
        now = Randomness.now(self.device)
        return (now if self.own_code else now.torchs()).tensors()

    def at(self, index: int) -> None:
        """Let the progress say that module `index` is at work."""
        self.progress.module, self.progress.module_name = index, self.partition.modules[index].label

    def load(self, index: int) -> None:
        """Fill module `index` and its head from disk. Raises BudgetExceededError, DamagedFileError."""
        self.budget.attempt(
            lambda: self.store.load(index, self.partition.modules[index], self.heads[index], self.device),
            f"loading module {index}",
        )

    def evict(self, index: int) -> None:
        """Drop module `index` and its head from memory; what is to be kept was saved before."""
        evict(self.partition.modules[index], self.heads[index])
        release_memory()

    def spill_cache(self, peak_bytes: int) -> bool:
        """Move boundaries from memory to disk where a step of `peak_bytes` has no room in the budget that comes.

        Whether they were moved. Raises StorageError.
        """
        is_counted = self.boundaries.tier == "memory" and self.meter.kind == "rss"
        if not is_counted or peak_bytes <= self.budget.coming_room:
            return False
        self.boundaries.spill()
        self.budget.need_not_hold(self.plan.cache_bytes)
        self.run.event("spilled", module=self.boundaries.index, bytes=self.plan.cache_bytes)
        return True

    @cached_property
    def loss(self) -> Loss:
        """The task loss of every module. Raises UsageError."""
        return task_loss(self.config, self.boundaries.source("train").labels, self.task)

    def objective(self, index: int, rung: Rung, multiplier: Multiplier | None = None) -> Objective:
        """The TRGL objective of module `index`, as `rung` trains it, under its `multiplier` where it has one."""
        config = self.config
        return Objective(
            self.partition.modules[index],
            self.heads[index],
            tau=config.tau_of(index - self.plan.passed, self.plan.num_modules - self.plan.passed),
            transport=config.transport,
            transport_norm=config.transport_norm,
            label_smoothing=config.label_smoothing,
            loss=self.loss,
            task=self.task,
            autocast=autocast_dtype(config.precision, self.device),
            multiplier=multiplier,
            pieces=self.partition.pieces(index) if rung.checkpointed else (),
        )

    def sweep(
        self, index: int, objective: Objective, buffer: Tensor, *, write: bool, splits: Sequence[str] | None = None
    ) -> Swept:
        """Every sample through module `index`, to the next boundary with `write`; of `splits` alone; see `sweep`."""
        module, parts = self.partition.modules[index], (self.boundaries, self.progress)
        keep = "val" if splits is None else None
        return sweep(objective, buffer, *parts, module, self.device, self.budget, write=write, keep=keep, splits=splits)

    def buffer(self, index: int, rung: Rung) -> Tensor:
        """An input buffer for module `index`, (micro-batch, *in_shape)."""
        return buffer_for(rung.micro_batch_size, self.partition.modules[index].in_shape, self.dtype(index))

    def epochs(self, index: int) -> int:
        """Of module `index` in each lap, `warm_epochs` aside; the network's own classifier has others."""
        return self.plan.epochs(self.config, index)

    def warm_epochs(self, index: int, lap: int) -> int:
        """In which the head of module `index` trains alone, before the two train together."""
        has_both = self.heads[index] is not None and not self.partition.modules[index].frozen
        return self.config.warm_heads if has_both and lap == 0 else 0

    def dtype(self, index: int) -> torch.dtype:
        """Of the input of module `index`."""
        return self.partition.chain.in_dtype if index == 0 else torch.float32
