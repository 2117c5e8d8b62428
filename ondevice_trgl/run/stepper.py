"""One module's optimizer steps inside the budget: a step that lacks memory is tried again, whole, a rung further down.

A rung further down is a smaller micro-batch, checkpointed activations, or gradients and optimizer state on disk, so
that the result is that of the same batch (but for BatchNorm, which sees smaller micro-batches). Nothing of the failed
try is left: gradients are dropped, buffers and the random generator are put back, parameters are only touched when all
gradients are there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ondevice_trgl.device.limit import lacks_memory
from ondevice_trgl.device.randomness import Randomness
from ondevice_trgl.errors import first_line
from ondevice_trgl.model.store import state_of
from ondevice_trgl.plan.plan import Rung, rung_within
from ondevice_trgl.run.batches import Source
from ondevice_trgl.run.budget import Budget
from ondevice_trgl.run.feed import Feed
from ondevice_trgl.run.relay import Relay
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.trgl.step import Objective, Tally, accumulate
from ondevice_trgl.units import format_size

_NOTABLY_LESS = 0.98
"""Of what the rung that was refused is predicted to take."""


@dataclass(frozen=True)
class Pressure:
    """Memory ran short: why, and what was done about it. `before` and `after` are rungs in words."""

    cause: str
    before: str
    after: str


SPILLED = Pressure("the budget was lowered", "cache in memory", "cache on disk")


class Stepper:
    """Trains one module on the rung `rung` of `ladder`, and further down where the budget demands it.

    `objective` makes the objective for a rung, `notify` is told of every pressure, `scratch` is a folder on disk.
    Memory: the input buffer (micro-batch, *in_shape), gradients, optimizer state, activations.
    """

    def __init__(
        self,
        objective: Callable[[Rung], Objective],
        optimizer: Optimizer,
        ladder: Sequence[Rung],
        rung: Rung,
        *,
        batch_size: int,
        in_shape: tuple[int, ...],
        in_dtype: torch.dtype,
        device: torch.device,
        budget: Budget,
        scratch: Path,
        notify: Callable[[Pressure, Rung], None],
    ) -> None:
        self._make, self.optimizer, self._ladder = objective, optimizer, ladder
        self._batch, self._shape, self._dtype, self._device = batch_size, in_shape, in_dtype, device
        self._budget, self._scratch, self._notify = budget, scratch, notify
        self._made_room = False
        self._steps = self._held = 0
        self._take(rung)

    def _take(self, rung: Rung) -> None:
        self.rung = rung
        if rung.spilled:
            self.optimizer.spill(self._scratch)
        self.objective = self._make(rung)
        self._feed: Feed | None = None
        self._between = 0
        own = state_of(self.objective.module).values()
        self._statistics = [tensor for tensor in own if not isinstance(tensor, nn.Parameter) and tensor.numel()]

    def _hold(self) -> None:
        """Hold the process to what was measured for this rung, or else to the budget."""
        self._budget.limit.hold(self.rung.hold)  # other modules may have had their turn
        self._budget.enforce(self.rung.peak_bytes if self.rung.measured else None)

    @property
    def feed(self) -> Feed:
        """What brings it (micro-batch, *in_shape) at a time."""
        if self._feed is None:
            self._feed = Feed(self.rung.micro_batch_size, self._shape, self._dtype, self._device)
        return self._feed

    @property
    def buffer(self) -> Tensor:
        """An input buffer on the CPU, (micro-batch, *in_shape)."""
        return self.feed.buffer

    def step(
        self,
        source: Source,
        indices: Sequence[int],
        lr: float,
        relay: Relay | None = None,
        following: Sequence[int] = (),
    ) -> Tally:
        """One update from the samples `indices`. Raises NonFiniteError, and BudgetExceededError below the last rung.

        `relay` is given what the module put out for them, by the weights from before the update; `following` are the
        samples of the next step.
        After either error, parameters, buffers and optimizer state are those from before the step.
        """
        if not self._made_room:
            self._hold()
        try:
            return self._step(source, indices, lr, relay, following)
        finally:
            if self._budget.is_tight:
                self._budget.enforce()  # what is refused between two steps cannot be tried again

    def _step(
        self, source: Source, indices: Sequence[int], lr: float, relay: Relay | None, following: Sequence[int]
    ) -> Tally:
        if self._between and self._budget.looks_at_growth():  # before anything is refused: not all code stands that
            self._budget.look_at_growth(self._between)
            self._fit("memory is in use beside training")
        if self._steps and self._budget.is_over():
            self._give_way(f"more than {format_size(self._budget.bytes)} in use between two steps")
        while True:
            kept = [tensor.clone() for tensor in self._statistics], Randomness.now(self._device)
            cause = ""
            try:
                self.optimizer.allocate()
                self._held = self._held or self._budget.held_bytes()
                moved = self.feed.micro_batches(source, indices, following)
                count = self._batch // self.rung.micro_batch_size
                onward = None if relay is None else relay.rewound()
                tally = self._budget.hands.do(partial(accumulate, self.objective, moved, count, onward))
                break
            except Exception as error:
                self.optimizer.drop_gradients()
                if not lacks_memory(error):
                    raise
                cause = first_line(error).split(". GPU ")[0][:160]  # what is free on a GPU of others is no news
            # outside of the handler: until there the traceback keeps the tensors of the failed try alive
            for tensor, before in zip(self._statistics, kept[0], strict=True):
                tensor.copy_(before)
            kept[1].restore(self._device)
            self._give_way(cause)
        # where it stops for want of memory it goes on the second time: what is updated has no gradient any more
        self._budget.attempt(lambda: self.optimizer.step(lr), "the update")
        self._steps += 1
        self._between = self._between or self._budget.held_bytes()
        return tally

    def close(self) -> None:
        """Drop what the optimizer has on disk."""
        self.optimizer.close()

    def fit(self) -> None:
        """Go down to a rung that is predicted to fit the budget, after that was lowered."""
        self._made_room = False
        self._fit("the budget was lowered")

    def _fit(self, cause: str) -> None:
        if self.rung.peak_bytes > self._budget.room and self._below():
            self._change(cause, rung_within(self._below(), self._budget.room))

    def overran(self, peak_bytes: int) -> None:
        """Go down a rung, if there is one, after a step that was done and took more than the budget all the same.

        What no limit refuses does that: code pages, holes in the heap that are filled again.
        """
        if self._below():
            self._give_way(f"{format_size(peak_bytes)} in the step before")

    def _below(self) -> Sequence[Rung]:
        return self._ladder[self._ladder.index(self.rung) + 1 :]

    def _give_way(self, cause: str) -> None:
        if not self._made_room:  # once: what lies about from before may be all there is to it
            self._made_room = True
            of_our_own = self._budget.is_tight  # the budget has more: nobody need hear of it
            self._budget.make_room()
            if of_our_own:
                return
            self._notify(Pressure(cause, str(self.rung), "memory given back, tried again"), self.rung)
            return
        below = self._below()
        if not below:
            raise self._budget.exceeded(f"{cause}, at {self.rung}, and nothing smaller is left")
        self._budget.look_at_growth(self._held)
        # a rung that is predicted to take hardly less would be refused as this one was
        self._change(cause, rung_within(below, min(self._budget.room, int(_NOTABLY_LESS * self.rung.peak_bytes))))

    def _change(self, cause: str, rung: Rung) -> None:
        before, warming = self.rung, self.objective.warming
        del self.objective
        self._feed = None
        self._budget.make_room()
        self._take(rung)
        self.objective.warming = warming
        self.objective.train_mode(True)
        self._hold()
        self._notify(Pressure(cause, str(before), str(rung)), rung)
