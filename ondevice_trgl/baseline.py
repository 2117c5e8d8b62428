"""End-to-end and checkpointed end-to-end training of the same work, each measured in a process of its own.

Same model, data, batch, threads, optimizer and allocator settings as the module-wise run, and the same lean update, so
that the comparison is with the best that end-to-end can do here. `python -m ondevice_trgl.baseline` reads one JSON
request on stdin and prints one JSON answer.
"""

import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.device.allocator import release_memory, tune
from ondevice_trgl.device.limit import lacks_memory
from ondevice_trgl.device.meter import meter_for
from ondevice_trgl.device.pages import release_code_pages
from ondevice_trgl.errors import ProcessDiedError, TrglError
from ondevice_trgl.model.partition import partition
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.processes import answer, ask
from ondevice_trgl.report.model import BASELINES, BaselineReport
from ondevice_trgl.run.batches import buffer_for, mix, shuffled, train_batches
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
    request = {
        "name": name,
        "workload": workload.to_dict(),
        "config": config.to_dict(),
        "batch_size": batch_size,
        "scratch_dir": str(scratch_dir),
        "allocator": allocator,
    }
    status, reason = "skipped", ""
    try:
        return BaselineReport(**ask("baseline", request))
    except ProcessDiedError as died:
        reason = died.message
        if died.returncode == -signal.SIGKILL:
            status, reason = "did_not_fit", "killed by the system, most likely for want of memory"
        elif died.returncode == -signal.SIGINT:
            reason = "interrupted"
    except TrglError as error:
        reason = error.message
    return BaselineReport(status=status, batch_size=batch_size, micro_batch_size=batch_size, reason=reason)


def _work(request: dict[str, Any]) -> dict[str, Any]:
    tune(request["allocator"])
    try:
        return vars(_measure(request))
    except (TrglError, RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        batch = request["batch_size"]
        words = str(error).strip().splitlines()
        return vars(
            BaselineReport(
                status="did_not_fit",
                batch_size=batch,
                micro_batch_size=batch,
                reason=words[0] if words else type(error).__name__,
            )
        )


def _measure(request: dict[str, Any]) -> BaselineReport:
    config = TrainConfig(**request["config"])
    batch: int = request["batch_size"]
    device = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if config.device == "auto"
        else torch.device(config.device)
    )
    meter = meter_for(device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data, model = load_workload(Workload(**request["workload"]), config.seed, Path(request["scratch_dir"]))
    if request["name"] == "e2e_checkpoint":
        forward = checkpointed(partition(model, torch.zeros(2, *data.input_shape)).modules)
    else:
        forward = model
    model.to(device).train()
    optimizer = Optimizer(
        config.optimizer, dict(model.named_parameters()), momentum=config.momentum, weight_decay=config.weight_decay
    )
    buffer = buffer_for(batch, data.input_shape, torch.float32)
    release_memory()  # as the module-wise run does before it trains
    release_code_pages()
    floor = meter.current_bytes()
    steps_per_epoch = len(data.train) // batch
    wanted = min(max(steps_per_epoch, _LEAST_STEPS), _MOST_STEPS)
    torch.manual_seed(mix(config.seed, 3))
    seconds: list[float] = []
    epoch = 0
    while len(seconds) < wanted + 1 and (len(seconds) <= _LEAST_STEPS or sum(seconds) < _MOST_SECONDS):
        for micro_batches in train_batches(data.train, shuffled(len(data.train), config.seed, epoch), batch, buffer):
            started = time.perf_counter()
            for z, labels in micro_batches:
                _step(forward, optimizer, z.to(device), labels.to(device), config)
            seconds.append(time.perf_counter() - started)
            if len(seconds) > wanted or (len(seconds) > _LEAST_STEPS and sum(seconds) > _MOST_SECONDS):
                break
        epoch += 1
    _validate(model, data.val.labels, data.val, buffer, device)
    timed = seconds[1:]  # the first step warms up
    return BaselineReport(
        status="measured",
        batch_size=batch,
        micro_batch_size=batch,
        measured_peak_bytes=meter.peak_bytes(),
        seconds_per_epoch=sum(timed) / len(timed) * steps_per_epoch,
        floor_bytes=floor if meter.kind == "rss" else 0,
        timed_steps=len(timed),
    )


def _step(forward: Any, optimizer: Optimizer, z: Tensor, labels: Tensor, config: TrainConfig) -> None:
    loss = functional.cross_entropy(forward(z), labels, label_smoothing=config.label_smoothing)
    loss.backward()
    optimizer.step(config.learning_rate)


@torch.no_grad()
def _validate(model: nn.Module, labels: Tensor, source: Any, buffer: Tensor, device: torch.device) -> None:
    """One validation batch: it belongs to the peak."""
    model.eval()
    source.read(range(min(len(labels), len(buffer))), buffer)
    model(buffer.to(device))


if __name__ == "__main__":
    raise SystemExit(answer(_work))
