"""Checkpoints: a module with its position, optimizer state and random generator, written whole or not at all."""

import dataclasses
import time

from torch import Tensor

from ondevice_trgl.run.context import Context
from ondevice_trgl.run.position import Position

CHECKPOINT_SECONDS = 60.0


class Checkpointer:
    """Saves modules of `context`, and knows when the next checkpoint in mid-training is due."""

    def __init__(self, context: Context, seconds: float = CHECKPOINT_SECONDS) -> None:
        self._context, self._seconds = context, seconds
        self._saved_at = time.perf_counter()
        self._saves = 0

    def position(self, index: int) -> Position:
        """Where module `index` stands on disk. No tensor is read."""
        return Position.from_dict(self._context.store.position(index))

    def restore_callbacks(self) -> None:
        """Give each callback the state that it had at the last checkpoint, where there is one."""
        positions = map(self.position, range(len(self._context.heads)))
        latest = max(positions, key=lambda position: position.saves)
        self._saves = latest.saves
        for callback, (name, state) in zip(self._context.progress.callbacks, latest.callbacks, strict=False):
            if name == type(callback).__qualname__ and state:
                callback.load_state_dict(dict(state))

    def is_due(self) -> bool:
        """Whether the last checkpoint is old."""
        return time.perf_counter() - self._saved_at >= self._seconds

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
        context = self._context
        self._saves += 1
        callbacks = tuple((type(c).__qualname__, c.state_dict()) for c in context.progress.callbacks)
        values = dataclasses.replace(position, saves=self._saves, callbacks=callbacks).to_dict()
        module, head = context.partition.modules[index], context.heads[index]
        context.budget.attempt(
            lambda: context.store.save(index, module, head, values, optim=optim, run=run, pending=pending),
            f"the checkpoint of module {index}",
        )
        self._saved_at = time.perf_counter()

    def commit(self) -> None:
        """Let all that is pending be the checkpoint, at once. Raises StorageError."""
        self._context.store.commit()
