"""Every sample once through a trained module: its accuracy, and the boundary that the next module reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ondevice_trgl.errors import NonFiniteError
from ondevice_trgl.model.partition import LocalModule
from ondevice_trgl.run.batches import Source, all_rows, check_finite, place
from ondevice_trgl.run.boundaries import Boundaries
from ondevice_trgl.run.budget import Budget
from ondevice_trgl.run.measured import Paused
from ondevice_trgl.run.progress import Progress
from ondevice_trgl.run.relay import Relay
from ondevice_trgl.run.stepper import Stepper
from ondevice_trgl.trgl.step import Objective
from ondevice_trgl.trgl.task import Score


@dataclass(frozen=True)
class Swept:
    """The metric by split, and the predictions of the split that was to be kept; neither where there is no head.

    Predictions are (rows, outputs), as "probabilities", which those of classes are.
    """

    accuracy: dict[str, float]
    probabilities: dict[str, Tensor]
    rmse: dict[str, float] = field(default_factory=dict)
    """Of a regression, the root of the mean squared error by split."""

    def take(self, split: str, score: Score, *, keep: bool) -> None:
        """What was found of `split`."""
        self.accuracy[split] = score.value()
        if (error := score.rmse()) is not None:
            self.rmse[split] = error
        if keep and score.predictions is not None:
            self.probabilities["probabilities"] = score.predictions


def sweep(
    objective: Objective,
    buffer: Tensor,
    boundaries: Boundaries,
    progress: Progress,
    module: LocalModule,
    device: torch.device,
    budget: Budget,
    *,
    write: bool,
    keep: str | None = "val",
    splits: Sequence[str] | None = None,
) -> Swept:
    """Pass every split of the boundary that is read through `module` and its head, in eval mode, without gradients.
    With `splits`, those alone.

    With `write`, the module's own boundary is cached; of the split `keep` the predictions are returned.
    Raises Paused where that is asked for meanwhile, the next boundary left half written; NonFiniteError, StorageError,
    BudgetExceededError, and UsageError where a metric of the user's fails.
    """
    objective.train_mode(False)
    found = Swept({}, {})
    for split in (boundaries.splits if write else boundaries.judged) if splits is None else splits:
        source = boundaries.source(split)
        rows = len(source.labels)
        judged = split in boundaries.judged and not module.passed
        score = objective.task.score(source.labels, keep=split == keep) if judged else None
        progress.enter("cache" if write else "validate", -(-rows // len(buffer)))
        for z, labels, start, count in all_rows(source, buffer):
            if progress.pause.is_set():
                raise Paused
            out, logits, finite = budget.attempt(
                partial(_evaluate, objective, z, count, device),
                f"a forward pass of {len(z)} samples through module {boundaries.index}",
            )
            if not finite:
                raise _not_finite(boundaries.index, module.label, split, z[:count], start)
            if logits is not None and score is not None:
                score.add(logits, labels)
            if write:
                kept = partial(boundaries.append, split, module.out_shape, out, labels)
                budget.attempt(kept, f"the cache behind module {boundaries.index}")
            progress.step += 1
            progress.rest()
            if write:
                progress.call("on_cache_write")
        if score is not None:
            found.take(split, score, keep=split == keep)
            del score  # before the next takes its place: it may hold predictions
    return found


def _evaluate(objective: Objective, z: Tensor, count: int, device: torch.device) -> tuple[Tensor, Tensor | None, bool]:
    """As `Objective.evaluate`, logits on the CPU, and whether what comes last is finite."""
    out, logits = objective.evaluate(z.to(device), count)
    finite = bool(torch.isfinite(out if logits is None else logits).all())
    return out, None if logits is None else logits.cpu(), finite


def _not_finite(index: int, label: str, split: str, z: Tensor, start: int) -> NonFiniteError:
    """The error for outputs of a sweep that are not finite; it is the input's fault, or else the module's."""
    check_finite(z, range(start, start + len(z)), place(index, split))
    return NonFiniteError(
        f"module {index} ({label}) gives NaN or infinity on {split} samples from {start} on",
        hint="start again with a lower --lr or a larger --tau; the weights up to the last checkpoint are kept",
    )


def swept_through(
    steppers: Sequence[Stepper],
    boundaries: Boundaries,
    progress: Progress,
    modules: Sequence[LocalModule],
    device: torch.device,
    budget: Budget,
    relay: Relay,
    batch: int,
    *,
    write: bool,
    keep: str = "val",
) -> list[Swept]:
    """As `sweep` of one module after another, all of them being in memory: `batch` samples at a time go through all.

    With `write`, what the last module puts out is cached.
    Micro-batches are those that `sweep` makes, so that the outcome is the same. Errors as there.
    """
    for stepper in steppers:
        stepper.objective.train_mode(False)
    found = [Swept({}, {}) for _ in steppers]
    for split in boundaries.splits if write else boundaries.judged:
        data = boundaries.source(split)
        rows = len(data.labels)
        judged = steppers if split in boundaries.judged else ()
        scores = [stepper.objective.task.score(data.labels, keep=split == keep) for stepper in judged]
        progress.enter("cache" if write else "validate", -(-rows // batch))
        for first in range(0, rows, batch):
            if progress.pause.is_set():
                raise Paused
            count = min(batch, rows - first)
            relay.begin(data.labels[first : first + count], modules[0].out_shape)
            source: Source = data
            for index, stepper in enumerate(steppers):
                put, offset = relay.rewound(), 0 if index else first
                for at in range(0, count, len(stepper.buffer)):
                    part = min(len(stepper.buffer), count - at)
                    labels = source.read(range(offset + at, offset + at + part), stepper.buffer)
                    out, logits, finite = budget.attempt(
                        partial(_evaluate, stepper.objective, stepper.buffer, part, device),
                        f"a forward pass of {len(stepper.buffer)} samples through module {boundaries.index + index}",
                    )
                    assert logits is not None  # the frozen front is not among them
                    if not finite:
                        where = boundaries.index + index
                        raise _not_finite(where, modules[index].label, split, stepper.buffer[:part], first + at)
                    if judged:
                        scores[index].add(logits, labels)
                    if index + 1 < len(steppers):
                        put(out)
                    elif write:
                        kept = partial(boundaries.append, split, modules[index].out_shape, out, labels)
                        budget.attempt(kept, f"the cache behind module {boundaries.index + index}")
                if index + 1 < len(steppers):
                    relay.advance(modules[index + 1].out_shape)
                source = relay
            progress.step += 1
            progress.rest()
            if write:
                progress.call("on_cache_write")
        for swept in found if judged else ():
            swept.take(split, scores.pop(0), keep=split == keep)
    return found
