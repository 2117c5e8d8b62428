"""End-to-end training of a whole network, step by step, for baselines: plain, and tuned as the module-wise run is."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.data.augment import Augmented
from ondevice_trgl.data.bundle import DataBundle
from ondevice_trgl.data.images import ImageSet, one_label
from ondevice_trgl.device.precision import autocast_dtype
from ondevice_trgl.model.output import logits_of
from ondevice_trgl.model.partition import segments_of
from ondevice_trgl.model.trace import Chain, trace
from ondevice_trgl.run.batches import Source, all_rows, buffer_for, epoch_order, train_batches
from ondevice_trgl.trgl.checkpoint import checkpointed
from ondevice_trgl.trgl.loss import task_loss
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.trgl.precision import in_precision, whole_precision
from ondevice_trgl.trgl.task import Task

LEAST_STEPS, MOST_STEPS = 3, 24
"""Beside the first, where speed alone is measured."""


@dataclass(frozen=True)
class Pace:
    """How many steps are made, and at which learning rates."""

    config: TrainConfig
    steps_per_epoch: int
    full: bool

    @property
    def steps(self) -> int:
        if self.full:
            return self.config.epochs * self.config.laps * self.steps_per_epoch
        return 1 + min(max(self.steps_per_epoch, LEAST_STEPS), MOST_STEPS)

    def rate(self, done: int) -> float:
        """Behind `done` steps: that of a module of the run, as far through its epochs, every lap anew."""
        if not self.full:
            return self.config.learning_rate
        lap = self.config.epochs * self.steps_per_epoch
        return self.config.learning_rate_at(done % lap / lap)


Judge = Callable[[ImageSet, bool], float | None]
"""The task's metric of the whole set; or of its first batch a pass alone, without one."""
Work = tuple[Iterator[None], Judge]
"""Steps without end, each done as it is asked for; and validation, which belongs to the peak."""


class _Balanced:
    """A sampler for a DataLoader: the epochs of a balanced run, one each time that it is gone through."""

    def __init__(self, labels: Tensor, seed: int) -> None:
        self._labels, self._seed, self._epoch = labels, seed, 0

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self._labels, self._seed, epoch=self._epoch, balance=True)
        self._epoch += 1
        return iter(order)


class _Samples:
    """A map-style dataset of what `source` has, read as `dtype`."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.source, self._dtype = source, dtype

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        out = torch.empty(1, *self.source.shape, dtype=self._dtype)
        labels = self.source.read([index], out)
        return out[0], one_label(labels)


def plain(
    model: nn.Module,
    data: DataBundle,
    config: TrainConfig,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    chain: Chain | None = None,
) -> Work:
    """What anybody would write: torch.optim and a DataLoader. `chain`: the model's, where its layers keep to a mode."""
    from torch.utils.data import DataLoader

    rate, decay = config.learning_rate, config.weight_decay
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(trained, lr=rate, momentum=config.momentum, weight_decay=decay)
    else:
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    name = type(model).__name__
    sampler = _Balanced(data.train.labels, config.seed) if config.balance else None
    views, samples = Augmented.of(data.train, config), _Samples(data.train, dtype)
    train: DataLoader[Any] = DataLoader(
        samples,  # type: ignore[arg-type]
        batch_size=batch,
        shuffle=sampler is None,
        sampler=sampler,
        drop_last=True,
    )

    autocast = autocast_dtype(config.precision, device)
    task = Task.of(config, data.preprocessing.task, data.num_classes)
    task_of_batch = task_loss(config, data.train.labels, task)

    def steps() -> Iterator[None]:
        _train_mode(model, chain)
        for epoch in itertools.count():
            samples.source = data.train if views is None else views.view(epoch)
            for images, labels in train:
                optimizer.zero_grad()
                with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
                    output = logits_of(model(images.to(device)), name)
                loss = task_of_batch(whole_precision(output), labels.to(device))
                loss.backward()
                if config.clip_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
                optimizer.step()
                yield

    @torch.no_grad()
    def judge(split: ImageSet, whole: bool) -> float | None:
        model.eval()
        samples: DataLoader[Any] = DataLoader(_Samples(split, dtype), batch_size=batch)  # type: ignore[arg-type]
        score = task.score(split.labels)
        for images, labels in samples:
            score.add(logits_of(model(images.to(device)), name).cpu(), labels)
            if not whole:
                return None
        return score.value()

    return steps(), judge


def tuned(
    model: nn.Module,
    data: DataBundle,
    config: TrainConfig,
    pace: Pace,
    batch: int,
    micro: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    checkpoint: bool,
    chain: Chain | None = None,
) -> Work:
    """The best that end-to-end can do here: micro-batches, the lean update and, with `checkpoint`, the segments'
    activations computed again in the backward pass. `chain` as `plain` has it.
    """
    name = type(model).__name__

    autocast = autocast_dtype(config.precision, device)
    model_in_precision = in_precision(model, autocast)

    def whole(z: Tensor) -> Tensor:
        return whole_precision(logits_of(model_in_precision(z), name))

    if checkpoint:
        whole_chain = chain or trace(model, torch.zeros(2, *data.input_shape, dtype=dtype))
        segments = segments_of(whole_chain)
        for segment in segments:
            segment.train(not segment.passed)
        pieces = checkpointed([in_precision(segment, autocast) for segment in segments])

        def forward(z: Tensor) -> Tensor:
            return whole_precision(pieces(z))

    else:
        forward = whole
    _train_mode(model.to(device), chain)
    trained = {path: parameter for path, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = Optimizer(
        config.optimizer,
        trained,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    buffer = buffer_for(micro, data.input_shape, dtype)

    task = Task.of(config, data.preprocessing.task, data.num_classes)
    loss = task_loss(config, data.train.labels, task)
    views = Augmented.of(data.train, config)

    def steps() -> Iterator[None]:
        epoch = done = 0
        while True:
            order = epoch_order(data.train.labels, config.seed, epoch=epoch, balance=config.balance)
            source = data.train if views is None else views.view(epoch)
            for micro_batches in train_batches(source, order, batch, buffer):
                for z, labels in micro_batches:
                    _add_gradients(forward, z.to(device), labels.to(device), loss, micro / batch)
                optimizer.step(pace.rate(done))
                done += 1
                yield
            epoch += 1

    @torch.no_grad()
    def judge(split: ImageSet, to_the_end: bool) -> float | None:
        model.eval()
        score = task.score(split.labels)
        for z, labels, _, count in all_rows(split, buffer):
            score.add(whole(z.to(device))[:count].cpu(), labels)
            if not to_the_end:
                return None
        return score.value()

    return steps(), judge


def _train_mode(model: nn.Module, chain: Chain | None) -> None:
    """Train mode, but for layers that keep to one."""
    if chain is None:
        model.train()
    else:
        chain.modes.apply(model, training=True)


def _add_gradients(
    forward: Callable[[Tensor], Tensor],
    z: Tensor,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    share: float,
) -> None:
    """Those of the mean loss of `z`, which is that share of a batch."""
    (loss(forward(z), labels) * share).backward()
