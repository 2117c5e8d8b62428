"""Checkpoints: a module with its position, optimizer state and random generator, written whole or not at all."""

import dataclasses
import time

from torch import Tensor

from ondevice_trgl.run.context import Context
from ondevice_trgl.run.position import Position
from ondevice_trgl.run.run_dir import WEIGHTS
from ondevice_trgl.units import parse_interval


class Checkpointer:
    """Saves modules of `context`, and knows when the next checkpoint in mid-training is due."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._every = parse_interval(context.config.checkpoint_every)
        self._saved_at, self._steps = time.perf_counter(), 0
        self._saves = 0
        self.seconds = 0.0
        """Spent on writing, by this sitting."""
        self._written_before = 0

    @property
    def written_bytes(self) -> int:
        """That the run has written to disk, by this sitting and those before."""
        context = self._context
        return self._written_before + context.store.written_bytes + context.boundaries.written_bytes

    def restore(self, reported_bytes: int) -> None:
        """Take up what earlier sittings left: what they wrote, `reported_bytes` or more, and the callbacks' state."""
        store, run = self._context.store, self._context.run
        staged = run.path / WEIGHTS
        known = [reported_bytes, staged.stat().st_size if staged.is_file() else 0]
        known += [
            position.written_bytes + store.path(index).stat().st_size
            for index, position in enumerate(map(self.position, range(len(self._context.heads))))
            if position.saves
        ]
        self._written_before = max(known)
        self._restore_callbacks()

    def position(self, index: int) -> Position:
        """Where module `index` stands on disk. No tensor is read."""
        return Position.of(self._context.store, index)

    def _restore_callbacks(self) -> None:
        """Give each callback the state that it had at the last checkpoint, where there is one."""
        positions = map(self.position, range(len(self._context.heads)))
        latest = max(positions, key=lambda position: position.saves)
        self._saves = latest.saves
        for callback, (name, state) in zip(self._context.progress.callbacks, latest.callbacks, strict=False):
            if name == type(callback).__qualname__ and state:
                callback.load_state_dict(dict(state))

    def is_due(self) -> bool:
        """Whether the last checkpoint is old. To be asked once behind every step."""
        self._steps += 1
        if self._every.steps is not None:
            return self._steps >= self._every.steps
        return time.perf_counter() - self._saved_at >= (self._every.seconds or 0.0)

    def save(
        self,
        index: int,
        position: Position,
        *,
        optim: dict[str, Tensor],
        run: dict[str, Tensor],
        pending: bool = False,
    ) -> None:
        """Write module `index` as it stands; with `pending`, for `commit`. Raises StorageError, BudgetExceededError."""
        context, began = self._context, time.perf_counter()
        self._saves += 1
        callbacks = tuple((type(c).__qualname__, c.state_dict()) for c in context.progress.callbacks)
        values = dataclasses.replace(
            position, saves=self._saves, written_bytes=self.written_bytes, callbacks=callbacks
        ).to_dict()
        module, head = context.partition.modules[index], context.heads[index]
        context.budget.attempt(
            lambda: context.store.save(index, module, head, values, optim=optim, run=run, pending=pending),
            f"the checkpoint of module {index}",
        )
        self._saved_at, self._steps = time.perf_counter(), 0
        self.seconds += self._saved_at - began

    def commit(self) -> None:
        """Let all that is pending be the checkpoint, at once. Raises StorageError."""
        began = time.perf_counter()
        self._context.store.commit()
        self.seconds += time.perf_counter() - began
