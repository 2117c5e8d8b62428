"""End-to-end training of the same work, measured in a process of its own: tuned in several ways, and plain.

`e2e`, `e2e_accumulate` and `e2e_checkpoint` have the model, data, batch, threads, optimizer and allocator settings of
the module-wise run, and the same lean update, so that the comparison is with the best that end-to-end can do here.
`plain` is what anybody would write: torch.optim, a DataLoader, nothing tuned. `python -m ondevice_trgl.baseline` reads
one JSON request on stdin and prints one JSON answer.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.device.allocator import release_memory, tune
from ondevice_trgl.device.limit import lacks_memory
from ondevice_trgl.device.meter import meter_for, own_peak_rss
from ondevice_trgl.device.pages import release_code_pages
from ondevice_trgl.device.waiting import Waiting
from ondevice_trgl.end_to_end import LEAST_STEPS, Pace, plain, tuned
from ondevice_trgl.errors import TrglError
from ondevice_trgl.job import BaselineRequest
from ondevice_trgl.model.norms import batch_norms
from ondevice_trgl.model.tuning import tuned as frozen
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.processes import answer, ask, why_not
from ondevice_trgl.report.model import BASELINES, BaselineReport
from ondevice_trgl.run.batches import mix
from ondevice_trgl.run.inputs import traced
from ondevice_trgl.units import format_size
from ondevice_trgl.workload import load_workload

_MOST_SECONDS = 12.0


def measure_baselines(
    workload: Workload, config: TrainConfig, plan: Plan, *, wanted: str, scratch_dir: Path, allocator: str
) -> dict[str, BaselineReport]:
    """Every baseline at the batch size of `plan`. `wanted`: skip; auto, where it is predicted to fit; measure; full.

    With full, end-to-end is trained to the end; where that does not fit, checkpointed end-to-end is instead.
    """
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
    # as many epochs as the run's modules have in the mean
    epochs = config.mean_epochs(plan.num_trained) if plan.num_trained else config.own_epochs
    config = dataclasses.replace(config, epochs=epochs, epochs_rule="constant", warm_heads=0)
    found: dict[str, BaselineReport] = {}
    for name in BASELINES:
        full = wanted == "full" and all(one.epochs is None for one in found.values())
        found[name] = measure_baseline(
            name, workload, config, batch_size=batch, scratch_dir=scratch_dir, allocator=allocator, full=full
        )
    return found


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def measure_baseline(
    name: str,
    workload: Workload,
    config: TrainConfig,
    *,
    batch_size: int,
    scratch_dir: Path,
    allocator: str = "system",
    full: bool = False,
) -> BaselineReport:
    """Measure baseline `name` (e2e or e2e_checkpoint) in a child process; `full`, train it to the end.

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
        full=full,
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
    data, model = load_workload(request.workload, config.seed, request.scratch_dir, config.asked_task)
    batch = min(request.batch_size, len(data.train))
    # statistics of one sample are none, or refused
    micro = request.micro_batch(batch, least=2 if next(batch_norms(model), None) is not None else 1)
    # what is no whole number is float32, without a trace that plain training has no need of
    dtype, chain = torch.float32, None
    if data.train.whole is not None or config.fine_tunes:
        chain = frozen(traced(model, data.train, freeze_norms=config.freeze_norms), config)
        dtype, chain = chain.in_dtype, chain if config.fine_tunes else None
    steps_per_epoch = len(data.train) // batch
    pace = Pace(config, steps_per_epoch, request.full)
    if request.name == "plain":
        steps, judge = plain(model.to(device), data, config, batch, device, dtype, chain=chain)
    else:
        checkpoint = request.name == "e2e_checkpoint"
        steps, judge = tuned(model, data, config, pace, batch, micro, device, dtype, checkpoint=checkpoint, chain=chain)
        release_memory()  # as the module-wise run does before it trains
        release_code_pages()
    waiting = None if request.name == "plain" else Waiting(torch.get_num_threads())  # as module-wise training has it
    floor = meter.current_bytes()
    seconds: list[float] = []
    torch.manual_seed(mix(config.seed, 3))
    while len(seconds) < pace.steps and (pace.full or len(seconds) <= LEAST_STEPS or sum(seconds) <= _MOST_SECONDS):
        started = time.perf_counter()
        next(steps)
        if waiting is not None:
            waiting.look()
        seconds.append(time.perf_counter() - started)
    if waiting is not None:
        waiting.close()
    judged = {name: judge(split, pace.full) for name, split in (("val", data.val), ("test", data.test))}
    timed = seconds[1:] or seconds  # the first step warms up
    whole = meter.kind == "rss"
    return BaselineReport(
        status="measured",
        batch_size=batch,
        micro_batch_size=micro,
        measured_peak_bytes=max(meter.peak_bytes(), starting if whole else 0),
        seconds_per_epoch=sum(timed) / len(timed) * steps_per_epoch,
        floor_bytes=floor if whole else 0,
        timed_steps=len(timed),
        epochs=config.epochs * config.laps if pace.full else None,
        val_accuracy=judged["val"],
        test_accuracy=judged["test"],
    )


if __name__ == "__main__":
    raise SystemExit(answer(_work))
