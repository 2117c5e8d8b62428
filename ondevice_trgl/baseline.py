"""End-to-end training of the same work, measured in a process of its own: tuned in several ways, and plain.

`e2e`, `e2e_accumulate` and `e2e_checkpoint` have the model, data, batch, threads, optimizer and allocator settings of
the module-wise run, and the same lean update, so that the comparison is with the best that end-to-end can do here.
`plain` is what anybody would write: torch.optim, a DataLoader, nothing tuned. `python -m ondevice_trgl.baseline` reads
one JSON request on stdin and prints one JSON answer.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.data.bundle import DataBundle
from ondevice_trgl.data.images import ImageSet
from ondevice_trgl.device.allocator import release_memory, tune
from ondevice_trgl.device.limit import lacks_memory
from ondevice_trgl.device.meter import meter_for, own_peak_rss
from ondevice_trgl.device.pages import release_code_pages
from ondevice_trgl.errors import TrglError
from ondevice_trgl.job import BaselineRequest
from ondevice_trgl.model.norms import batch_norms
from ondevice_trgl.model.output import logits_of
from ondevice_trgl.model.partition import segments_of
from ondevice_trgl.model.trace import trace
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.processes import answer, ask, why_not
from ondevice_trgl.report.model import BASELINES, BaselineReport
from ondevice_trgl.run.batches import buffer_for, epoch_order, mix, train_batches
from ondevice_trgl.run.inputs import traced
from ondevice_trgl.trgl.checkpoint import checkpointed
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.units import format_size
from ondevice_trgl.workload import load_workload

_LEAST_STEPS, _MOST_STEPS, _MOST_SECONDS = 3, 24, 12.0


def measure_baselines(
    workload: Workload, config: TrainConfig, plan: Plan, *, wanted: str, scratch_dir: Path, allocator: str
) -> dict[str, BaselineReport]:
    """Every baseline at the batch size of `plan`. `wanted`: skip; auto, where it is predicted to fit; measure."""
    batch, predicted = plan.batch_size, plan.end_to_end_bytes
    reason = ""
    if wanted == "skip":
        reason = "not asked for"
    elif wanted == "auto" and predicted > (free := _free_memory()):
        reason = (
            f"predicted to need {format_size(predicted)}, {format_size(free)} are free; "
            "--baseline measure tries all the same"
        )
    if reason:
        skipped = BaselineReport(status="skipped", batch_size=batch, micro_batch_size=batch, reason=reason)
        return dict.fromkeys(BASELINES, skipped)
    return {
        name: measure_baseline(name, workload, config, batch_size=batch, scratch_dir=scratch_dir, allocator=allocator)
        for name in BASELINES
    }


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def measure_baseline(
    name: str, workload: Workload, config: TrainConfig, *, batch_size: int, scratch_dir: Path, allocator: str = "system"
) -> BaselineReport:
    """Measure baseline `name` (e2e or e2e_checkpoint) in a child process.

    A child that is killed or refused memory is reported as did_not_fit, one that fails otherwise as skipped with the
    reason: no figure is ever made up for either.
    """
    request = BaselineRequest(
        name=name,
        workload=workload,
        config=config,
        batch_size=batch_size,
        scratch_dir=scratch_dir,
        allocator=allocator,
    )
    try:
        return BaselineReport(**ask("baseline", request.to_dict()))
    except TrglError as error:
        status, reason = why_not(error)
    return BaselineReport(
        status="skipped" if status == "failed" else status,
        batch_size=batch_size,
        micro_batch_size=batch_size,
        reason=reason,
    )


def _work(values: dict[str, Any]) -> dict[str, Any]:
    request = BaselineRequest.from_dict(values)
    tune(request.allocator)
    try:
        return vars(_measure(request))
    except (TrglError, RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        words = str(error).strip().splitlines()
        return vars(
            BaselineReport(
                status="did_not_fit",
                batch_size=request.batch_size,
                micro_batch_size=request.micro_batch(request.batch_size),
                reason=words[0] if words else type(error).__name__,
            )
        )


def _measure(request: BaselineRequest) -> BaselineReport:
    config = request.config
    device = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if config.device == "auto"
        else torch.device(config.device)
    )
    starting = own_peak_rss()  # a meter counts from when it is made
    meter = meter_for(device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data, model = load_workload(request.workload, config.seed, request.scratch_dir)
    batch = min(request.batch_size, len(data.train))
    # statistics of one sample are none, or refused
    micro = request.micro_batch(batch, least=2 if next(batch_norms(model), None) is not None else 1)
    # what is no whole number is float32, without a trace that plain training has no need of
    dtype = torch.float32 if data.train.whole is None else traced(model, data.train).in_dtype
    if request.name == "plain":
        steps, validate = _plain(model.to(device), data, config, batch, device, dtype)
    else:
        checkpoint = request.name == "e2e_checkpoint"
        steps, validate = _tuned(model, data, config, batch, micro, device, dtype, checkpoint=checkpoint)
        release_memory()  # as the module-wise run does before it trains
        release_code_pages()
    floor = meter.current_bytes()
    steps_per_epoch = len(data.train) // batch
    wanted = min(max(steps_per_epoch, _LEAST_STEPS), _MOST_STEPS)
    torch.manual_seed(mix(config.seed, 3))
    seconds: list[float] = []
    while len(seconds) <= wanted and (len(seconds) <= _LEAST_STEPS or sum(seconds) <= _MOST_SECONDS):
        started = time.perf_counter()
        next(steps)
        seconds.append(time.perf_counter() - started)
    validate()
    timed = seconds[1:]  # the first step warms up
    whole = meter.kind == "rss"
    return BaselineReport(
        status="measured",
        batch_size=batch,
        micro_batch_size=micro,
        measured_peak_bytes=max(meter.peak_bytes(), starting if whole else 0),
        seconds_per_epoch=sum(timed) / len(timed) * steps_per_epoch,
        floor_bytes=floor if whole else 0,
        timed_steps=len(timed),
    )


Work = tuple[Iterator[None], Callable[[], None]]
"""Steps without end, each done as it is asked for, and one batch of validation, which belongs to the peak."""


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

    def __init__(self, source: ImageSet, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        out = torch.empty(1, *self._source.shape, dtype=self._dtype)
        labels = self._source.read([index], out)
        return out[0], int(labels[0])


def _plain(
    model: nn.Module, data: DataBundle, config: TrainConfig, batch: int, device: torch.device, dtype: torch.dtype
) -> Work:
    from torch.utils.data import DataLoader

    rate, decay = config.learning_rate, config.weight_decay
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=config.momentum, weight_decay=decay)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    name = type(model).__name__
    sampler = _Balanced(data.train.labels, config.seed) if config.balance else None
    train: DataLoader[Any] = DataLoader(
        _Samples(data.train, dtype),  # type: ignore[arg-type]
        batch_size=batch,
        shuffle=sampler is None,
        sampler=sampler,
        drop_last=True,
    )

    def steps() -> Iterator[None]:
        model.train()
        while True:
            for images, labels in train:
                optimizer.zero_grad()
                output = logits_of(model(images.to(device)), name)
                loss = functional.cross_entropy(output, labels.to(device), label_smoothing=config.label_smoothing)
                loss.backward()
                optimizer.step()
                yield

    @torch.no_grad()
    def validate() -> None:
        model.eval()
        val: DataLoader[Any] = DataLoader(_Samples(data.val, dtype), batch_size=batch)  # type: ignore[arg-type]
        images, _ = next(iter(val))
        model(images.to(device))

    return steps(), validate


def _tuned(
    model: nn.Module,
    data: DataBundle,
    config: TrainConfig,
    batch: int,
    micro: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    checkpoint: bool,
) -> Work:
    name = type(model).__name__

    def whole(z: Tensor) -> Tensor:
        return logits_of(model(z), name)

    forward: Callable[[Tensor], Tensor] = whole
    if checkpoint:
        forward = checkpointed(segments_of(trace(model, torch.zeros(2, *data.input_shape, dtype=dtype))))
    model.to(device).train()
    trained = {path: parameter for path, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = Optimizer(config.optimizer, trained, momentum=config.momentum, weight_decay=config.weight_decay)
    buffer = buffer_for(micro, data.input_shape, dtype)

    def steps() -> Iterator[None]:
        epoch = 0
        while True:
            order = epoch_order(data.train.labels, config.seed, epoch=epoch, balance=config.balance)
            for micro_batches in train_batches(data.train, order, batch, buffer):
                for z, labels in micro_batches:
                    _add_gradients(forward, z.to(device), labels.to(device), config, micro / batch)
                optimizer.step(config.learning_rate)
                yield
            epoch += 1

    @torch.no_grad()
    def validate() -> None:
        model.eval()
        data.val.read(range(min(len(data.val), micro)), buffer)
        model(buffer.to(device))

    return steps(), validate


def _add_gradients(
    forward: Callable[[Tensor], Tensor], z: Tensor, labels: Tensor, config: TrainConfig, share: float
) -> None:
    """Those of the mean loss of `z`, which is that share of a batch."""
    loss = functional.cross_entropy(forward(z), labels, label_smoothing=config.label_smoothing)
    (loss * share).backward()


if __name__ == "__main__":
    raise SystemExit(answer(_work))
