"""What is learned of a sample, handed on as one thing: what outputs mean, how they are judged, how wide they are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import ConfigError
from ondevice_trgl.tasks import ACCURACY, AUTO, CLASSES, METRICS, MULTI_LABEL, REGRESSION
from ondevice_trgl.trgl.metric import F1, R2, Accuracy, Figure, OwnMetric


@dataclass(frozen=True)
class Task:
    """A network with `outputs` outputs learns class numbers, int64 (N,), or targets, float32 (N, outputs)."""

    kind: str = CLASSES
    """classes | regression | multi-label"""
    outputs: int = 0
    own_metric: OwnMetric | None = None
    """In place of the kind's."""

    @classmethod
    def of(cls, config: TrainConfig, kind: str, outputs: int) -> "Task":
        """The task of data of that kind. Raises ConfigError where settings do not go with it."""
        if faults := config.task_faults(kind):
            raise ConfigError(faults, hint=f"the data are {kind}" if config.asked_task == AUTO else "")
        return cls(kind, outputs, None if config.metric == AUTO else OwnMetric(config.metric))

    @property
    def metric(self) -> str:
        """accuracy, r2, f1, or pkg.module:callable."""
        return METRICS[self.kind] if self.own_metric is None else self.own_metric.name

    @property
    def counts_right(self) -> bool:
        """Whether what is got right is counted while training too; other figures come out behind it."""
        return self.metric == ACCURACY

    def predictions(self, outputs: Tensor) -> Tensor:
        """Of outputs (n, T): class probabilities, numbers as they are, or probabilities of labels."""
        if self.kind == CLASSES:
            return outputs.softmax(1)
        return outputs.sigmoid() if self.kind == MULTI_LABEL else outputs

    def score(self, targets: Tensor, *, keep: bool = False) -> "Score":
        """To be fed a split, whose labels or targets are those, batch by batch; `keep` its predictions."""
        return Score(self, targets, keep=keep)

    def judged(self, predictions: Tensor, targets: Tensor) -> float:
        """The metric of `predictions` of a whole split."""
        if self.own_metric is not None:
            return self.own_metric(predictions, targets)
        figure = self.figure(targets, threshold=0.5)
        figure.add(predictions, targets)
        return figure.value()

    def figure(self, targets: Tensor, threshold: float) -> Figure:
        """The kind's own metric; a label is seen in what is above `threshold`."""
        if self.kind == REGRESSION:
            return R2(targets)
        return F1(targets.shape[1], threshold) if self.kind == MULTI_LABEL else Accuracy()

    def noise(self, rows: int) -> Tensor:
        """Labels or targets of `rows` samples that mean nothing."""
        if self.kind == CLASSES:
            return torch.arange(rows) % self.outputs
        drawn = torch.arange(rows * self.outputs).view(rows, self.outputs) % 2
        return drawn.float()

    def no_labels(self, rows: int) -> Tensor:
        """Labels or targets of `rows` samples of which none are known: zeros."""
        return torch.zeros(rows, dtype=torch.int64) if self.kind == CLASSES else torch.zeros(rows, self.outputs)


class Score:
    """The metric of one split. Memory: where predictions are kept, or the metric is the user's, (rows, outputs)."""

    def __init__(self, task: Task, targets: Tensor, *, keep: bool) -> None:
        self._task, self._targets = task, targets
        self._keeps = keep or task.own_metric is not None
        self._figure = (
            task.figure(targets, threshold=0.0) if task.own_metric is None or task.kind == REGRESSION else None
        )
        self.predictions: Tensor | None = None
        """(rows, outputs), of what was added so far; None where none are kept."""
        self._rows = 0

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """The network's outputs (n, T) of the next samples, and what they should be; on the CPU."""
        if self._figure is not None:
            self._figure.add(outputs, targets)
        if self._keeps:
            if self.predictions is None:
                self.predictions = torch.empty(len(self._targets), outputs.shape[1])
            self.predictions[self._rows : self._rows + len(targets)] = self._task.predictions(outputs)
        self._rows += len(targets)

    def value(self) -> float:
        """The metric of the samples that were added. Raises UsageError where one of the user's fails."""
        if self._task.own_metric is None:
            assert self._figure is not None
            return self._figure.value()
        assert self.predictions is not None
        return self._task.own_metric(self.predictions[: self._rows], self._targets[: self._rows])

    def rmse(self) -> float | None:
        """The root of the mean squared error, of a regression; else None."""
        return self._figure.rmse() if isinstance(self._figure, R2) else None
