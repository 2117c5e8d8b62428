"""A trained network over a test set, one module in memory at a time, as it was measured while it trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.device.limit import lacks_memory
from ondevice_trgl.device.precision import autocast_dtype
from ondevice_trgl.errors import BudgetExceededError
from ondevice_trgl.model.partition import Partition
from ondevice_trgl.model.store import ModuleStore, evict
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.run.batches import Source, buffer_for
from ondevice_trgl.run.boundaries import Boundaries
from ondevice_trgl.run.budget import Budget
from ondevice_trgl.run.position import Position
from ondevice_trgl.run.progress import Progress
from ondevice_trgl.run.sweep import Swept, sweep
from ondevice_trgl.trgl.step import CLASS_NUMBERS, Objective
from ondevice_trgl.trgl.task import Task
from ondevice_trgl.units import format_size

_SPLIT = "test"


@dataclass(frozen=True)
class Accuracy:
    """The task's metric, of accuracy the share of the samples that were got right."""

    heads: tuple[float | None, ...]
    """Of each head up to the last that was asked for; None of modules without one."""
    ensemble: float | None = None
    """By the mean of the predictions of all those heads."""
    rmse: tuple[float | None, ...] = ()
    """Of each head, of a regression."""


@dataclass
class Evaluation:
    """Passes `source` through the modules of a run; `folder` takes the boundaries, two of which stand at a time.

    `partition` and `heads` are evicted, and are so again afterwards. The last module ends in the model's classifier.
    """

    partition: Partition
    heads: Sequence[nn.Module | None]
    plan: Plan
    store: ModuleStore
    source: Source
    folder: Path
    device: torch.device
    budget: Budget
    precision: str = "fp32"
    task: Task = CLASS_NUMBERS

    def run(self, last: int, *, ensemble: bool = False) -> Accuracy:
        """The accuracy of every head up to that of module `last`; modules behind it are not looked at.

        Memory: one module with its head and one micro-batch; with `ensemble`, two tensors (rows, classes) beside.
        Raises BudgetExceededError, StorageError, DamagedFileError, NonFiniteError.
        """
        swept, total = self._held(last, 0 if ensemble else None)
        mean = None if total is None else self._mean(total, last)
        return Accuracy(
            tuple(one.accuracy.get(_SPLIT) for one in swept),
            None if mean is None else self.task.judged(mean, self.source.labels),
            tuple(one.rmse.get(_SPLIT) for one in swept),
        )

    def predictions(self, last: int, *, ensemble: bool = False) -> Tensor:
        """Of the head of module `last`, float32 (rows, outputs); `ensemble`: mean of all up to it.

        Class probabilities, numbers, or probabilities of labels. Memory and errors as `run`.
        """
        total = self._held(last, 0 if ensemble else last)[1]
        assert total is not None
        return self._mean(total, last) if ensemble else total

    def _mean(self, total: Tensor, last: int) -> Tensor:
        return total.div_(sum(not module.passed for module in self.partition.modules[: last + 1]))

    def _held(self, last: int, first: int | None) -> tuple[list[Swept], Tensor | None]:
        """What was found by each head, and the sum of the predictions of heads from `first` on; None keeps none."""
        boundaries = Boundaries({_SPLIT: self.source}, "disk", self.plan.cache_dtype, self.folder)
        try:
            self.budget.start(self.plan.floor_bytes)
            return self._through(last, boundaries, first)
        except Exception as error:
            self.budget.end()  # wording takes memory too
            if not lacks_memory(error):
                raise
            message = f"the budget of {format_size(self.budget.bytes)} cannot be held: evaluating takes more"
            if isinstance(error, BudgetExceededError):
                message = error.message
            raise BudgetExceededError(message, hint="evaluate with a larger --budget") from error
        finally:
            self.budget.end()
            boundaries.close()
            evict(*self.partition.modules, *self.heads)
            release_memory()

    def _through(self, last: int, boundaries: Boundaries, first: int | None) -> tuple[list[Swept], Tensor | None]:
        found: list[Swept] = []
        total: Tensor | None = None
        for index in range(last + 1):
            self.budget.make_room()
            keep = first is not None and index >= first
            swept = self._sweep(index, boundaries, write=index < last, keep=_SPLIT if keep else None)
            evict(self.partition.modules[index], self.heads[index])
            release_memory()
            found.append(swept)
            if swept.probabilities:
                own = swept.probabilities.pop("probabilities")
                total = own if total is None else total.add_(own)
            if index < last:
                boundaries.advance()
        return found, total

    def _sweep(self, index: int, boundaries: Boundaries, *, write: bool, keep: str | None) -> Swept:
        module, head, budget = self.partition.modules[index], self.heads[index], self.budget
        budget.attempt(lambda: self.store.load(index, module, head, self.device), f"loading module {index}")
        objective = Objective(
            module, head, tau=None, transport="", transport_norm="", label_smoothing=0.0,
            autocast=autocast_dtype(self.precision, self.device), task=self.task,
        )  # fmt: skip
        progress = Progress(
            run_dir=self.folder, budget_bytes=budget.bytes, laps=1, num_modules=index + 1, lengths=(1,), steps=1,
            callbacks=(),
        )  # fmt: skip
        return sweep(
            objective, self._buffer(index), boundaries, progress, module, self.device, budget, write=write, keep=keep
        )

    def _buffer(self, index: int) -> Tensor:
        """An input buffer as large as the one with which the report's accuracy was measured."""
        swept_at = Position.of(self.store, index).way(self.plan.ladders[index], self.budget.bytes)
        dtype = self.partition.chain.in_dtype if index == 0 else torch.float32
        return buffer_for(swept_at.micro_batch_size, self.partition.modules[index].in_shape, dtype)
