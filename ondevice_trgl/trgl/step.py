"""One optimizer step of one local module: micro-batches through module and head, TRGL objective, update.

loss = cross-entropy(head(module(z)), y) + 1 / (2 tau) · transport cost        (arXiv 2309.17357, Eq. 10)

or with 1 / lambda in place of 1 / (2 tau), see `Multiplier`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ondevice_trgl.errors import NonFiniteError
from ondevice_trgl.model.partition import LocalModule
from ondevice_trgl.model.store import state_of
from ondevice_trgl.trgl.checkpoint import checkpointed
from ondevice_trgl.trgl.loss import Loss, cross_entropy
from ondevice_trgl.trgl.multiplier import Multiplier
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.trgl.precision import in_precision, whole_precision
from ondevice_trgl.trgl.task import Task
from ondevice_trgl.trgl.transport import has_transport, measured_pieces, with_transport

CLASS_NUMBERS = Task()


@dataclass
class Tally:
    """Sums over samples; divide by `samples`."""

    task_loss: float = 0.0
    transport_cost: float = 0.0
    correct: int = 0
    samples: int = 0
    counted: bool = True
    """Whether `correct` is: of classes, unless another metric is asked for."""

    def add(self, other: "Tally") -> None:
        self.task_loss += other.task_loss
        self.transport_cost += other.transport_cost
        self.correct += other.correct
        self.samples += other.samples
        self.counted = self.counted and other.counted

    def mean_task_loss(self) -> float | None:
        return self.task_loss / self.samples if self.samples else None

    def mean_transport(self) -> float | None:
        return self.transport_cost / self.samples if self.samples else None

    def accuracy(self) -> float | None:
        return self.correct / self.samples if self.samples and self.counted else None


class Figures(NamedTuple):
    """Of one micro-batch, scalars where it was computed: mean loss, mean transport cost, samples that were right."""

    task: Tensor
    transport: Tensor | None
    correct: Tensor | None
    samples: int


Onward = Callable[[Tensor], None]
"""Takes a module's output of a micro-batch, (micro-batch, *out_shape), on its way to the next module."""


class Objective:
    """A module with its head under the TRGL objective. `head` is None for the last module, which ends in logits.

    With `pieces`, whose composition is the module, each piece keeps its input alone for the backward pass. A frozen
    module stays in eval mode, and is passed through without gradients: its head alone trains, on cross-entropy. One of
    the frozen front has no head, and its output is no class scores.
    `loss` is the task loss; None is cross-entropy with `label_smoothing`. `task` says what the outputs are.
    With `autocast` module and head compute in that dtype; the loss and what they hand on are float32.
    A `multiplier`, which may move between two steps, weighs the transport cost in place of `tau`.
    """

    def __init__(
        self,
        module: LocalModule,
        head: nn.Module | None,
        *,
        tau: float | None,
        transport: str,
        transport_norm: str,
        label_smoothing: float,
        loss: Loss | None = None,
        task: Task = CLASS_NUMBERS,
        multiplier: Multiplier | None = None,
        pieces: Sequence[LocalModule] = (),
        autocast: torch.dtype | None = None,
    ) -> None:
        self.module, self.head, self.task = module, head, task
        self.frozen = module.frozen
        self.warming = False
        """Whether the module is, for now, passed through as a frozen one is, its head training alone."""
        self._multiplier = multiplier
        self._fixed = 0.0 if tau is None else 0.5 / tau
        self._loss = loss or partial(cross_entropy, label_smoothing=label_smoothing)
        self.measures_transport = bool(self.weight and not self.frozen and has_transport(module, transport))
        """Whether there is any here to weigh."""
        measured = self.measures_transport
        self._parts: list[nn.Module] = [with_transport(module, transport, transport_norm) if measured else module]
        # not among the submodules of anything: modes and weights are those of module and head
        self._plainly = in_precision(module, autocast)
        self._judged = None if head is None else in_precision(head, autocast)
        self._parts = [in_precision(part, autocast) for part in self._parts]
        self._forward: Callable[[Tensor], Any] = self._parts[0]
        if self.frozen:
            self._forward = self._without_gradients
        elif pieces:
            cut = measured_pieces(module, pieces, transport, transport_norm) if measured else list(pieces)
            self._parts = [in_precision(part, autocast) for part in cut]
            self._forward = checkpointed(self._parts)

    @property
    def weight(self) -> float:
        """Of the transport cost, as it is now."""
        return self._fixed if self._multiplier is None else self._multiplier.weight

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name: `module.*` and `head.*`."""
        own = state_of(self.module).items()
        named = {f"module.{name}": p for name, p in own if isinstance(p, nn.Parameter) and p.requires_grad}
        if self.head is not None:
            named |= {f"head.{name}": p for name, p in self.head.named_parameters()}
        return named

    def _without_gradients(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = self._plainly(z)
        return out

    def train_mode(self, training: bool) -> None:
        for part in (self.module, *self._parts):
            part.train(training and not self.frozen and not self.warming)
        if self.head is not None:
            self.head.train(training)

    def backward(self, z: Tensor, labels: Tensor, share: float, onward: Onward | None = None) -> Figures:
        """Add `share` of the gradient of the loss on (z, labels); returns what that was, without waiting for a GPU.

        `onward` is given what the module puts out for z, which it must copy.
        """
        if self.warming:
            out, transport = self._without_gradients(z), None
        else:
            out, transport = self._forward(z) if self.measures_transport else (self._forward(z), None)
        if onward is not None:
            onward(out.detach())
        logits = whole_precision(out if self._judged is None else self._judged(out))
        del out
        task = self._loss(logits, labels)
        loss = task if transport is None else task + self.weight * transport
        counted = self.task.counts_right
        correct = (logits.detach().argmax(1) == labels).sum() if counted else None
        del logits
        (loss * share).backward()
        return Figures(task.detach(), None if transport is None else transport.detach(), correct, len(labels))

    @torch.no_grad()
    def evaluate(self, z: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """(boundary activations, logits) of the first `count` rows; rows beyond are padding of a fixed shape.

        Logits are None where there is no head.
        """
        out = whole_precision(self._plainly(z))
        if self.module.passed:
            return out[:count], None
        logits = whole_precision(out if self._judged is None else self._judged(out))
        return out[:count], logits[:count]


def tally_of(figures: Sequence[Figures]) -> Tally:
    """The sums over all samples; waits once for the device that computes."""
    columns = [[f.task.double() for f in figures]]
    columns += [[f.transport.double() for f in figures if f.transport is not None]]
    columns += [[f.correct.double() for f in figures if f.correct is not None]]
    values = iter(torch.stack([scalar for column in columns for scalar in column]).tolist() if figures else ())
    task, transport, correct = ([next(values) for _ in column] for column in columns)
    samples = [f.samples for f in figures]
    return Tally(
        sum(loss * count for loss, count in zip(task, samples, strict=True)),
        sum(cost * count for cost, count in zip(transport, samples, strict=False)),
        int(sum(correct)),
        sum(samples),
        bool(correct) or not figures,
    )


def accumulate(
    objective: Objective,
    micro_batches: Iterable[tuple[Tensor, Tensor]],
    count: int,
    onward: Onward | None = None,
) -> Tally:
    """Gradients of one step from `count` micro-batches of equal size; parameters are left as they are.

    `onward` is given the module's output of each, in order. Raises NonFiniteError where the loss is NaN or infinite.
    """
    total = tally_of([objective.backward(z, labels, 1.0 / count, onward) for z, labels in micro_batches])
    if not math.isfinite(total.task_loss + total.transport_cost):
        raise NonFiniteError(f"the loss is {total.task_loss + total.transport_cost}")
    return total


def train_step(
    objective: Objective, optimizer: Optimizer, micro_batches: Iterable[tuple[Tensor, Tensor]], count: int, lr: float
) -> Tally:
    """One update from `count` micro-batches of equal size.

    Raises NonFiniteError, with the parameters as they were, where the loss is NaN or infinite.
    """
    try:
        total = accumulate(objective, micro_batches, count)
    except NonFiniteError:
        optimizer.drop_gradients()
        raise
    optimizer.step(lr)
    return total
