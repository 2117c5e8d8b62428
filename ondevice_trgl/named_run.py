"""A named job in the process that trains: datasets by name, modules from the run directory, baselines at the end."""

import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ondevice_trgl.baseline import measure_baseline
from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.data.registry import DataBundle
from ondevice_trgl.device.meter import meter_for
from ondevice_trgl.errors import DataError, RunDirError
from ondevice_trgl.job import Job
from ondevice_trgl.model.partition import group
from ondevice_trgl.model.store import ModuleStore
from ondevice_trgl.model.trace import trace
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.report.html import to_html
from ondevice_trgl.report.model import BASELINES, NOT_YET, BaselineReport, Report, read_report
from ondevice_trgl.run import results
from ondevice_trgl.run.callbacks import Callback
from ondevice_trgl.run.guards import device_named, global_state_kept
from ondevice_trgl.run.prepare import BLUEPRINT, open_run, sources
from ondevice_trgl.run.run_dir import RunDir, scratch_beside
from ondevice_trgl.run.session import Session
from ondevice_trgl.run.workload import load_bundle, load_workload
from ondevice_trgl.units import format_size


def sit(job: Job, peak_before: int, callbacks: Sequence[Callback]) -> Report:
    """Train from wherever the run directory of `job` stands, then measure the baselines.

    `peak_before` is what setting up took at most, in other processes of ours.
    """
    started = time.perf_counter()
    device = device_named(job.config.device)
    with global_state_kept(job.config.threads), meter_for(device) as meter:
        scratch, model = scratch_beside(job.run_dir), None
        if (job.run_dir / BLUEPRINT).is_file():
            bundle = load_bundle(job.workload, job.config.seed, scratch)
        else:
            bundle, model = load_workload(job.workload, job.config.seed, scratch)
        run = RunDir.open(job.run_dir)
        _check_digest(run, bundle)
        data = sources(bundle.train, bundle.val, bundle.test)
        prepared = open_run(job.run_dir, data, job.config, model)
        workload = run.read("config.json")["workload"]
        before = max(peak_before, meter.peak_bytes() if meter.kind == "rss" else 0)
        session = Session(prepared, data, callbacks, threading.Event(), meter, device, started, before, workload)
        report = session.run()
    return _complete(job, report)


def resume(run_dir: Path, callbacks: Sequence[Callback], budget: str | int | None = None) -> Report:
    """See `jobs.resume_job`."""
    run = RunDir.open(run_dir)
    if (run_dir / "report.json").is_file() and (report := read_report(run_dir)).status == "completed":
        # without baselines: it was interrupted while those were measured
        of_a_job = "model" in report.workload
        pending = any(baseline.reason == NOT_YET for baseline in report.baselines.values())
        return _complete(_recorded(run), report) if of_a_job and pending else report
    job = _recorded(run)
    if budget is not None:
        job = dataclasses.replace(job, config=dataclasses.replace(job.config, budget=budget))
    return sit(job, 0, callbacks)


def evaluate(
    run_dir: Path, *, head: str = "best", data: str | None = None, data_root: Path | str | None = None
) -> dict[str, Any]:
    """See `jobs.evaluate_run`."""
    run, report = RunDir.open(run_dir), read_report(run_dir)
    if report.status != "completed":
        raise RunDirError(f"{run_dir} is not finished, its status is {report.status}", hint="resume it first")
    job = _recorded(run)
    workload = dataclasses.replace(
        job.workload,
        data=job.workload.data if data is None else data,
        data_root=job.workload.data_root if data_root is None else data_root,
    )
    bundle, model = load_workload(workload, job.config.seed, scratch_beside(run_dir))
    for what, found in (("input_shape", list(bundle.input_shape)), ("num_classes", bundle.num_classes)):
        if found != report.workload[what]:
            raise DataError(
                f"{workload.data} has {what.replace('_', ' ')} {found}, "
                f"the run was trained with {report.workload[what]}",
                hint="evaluate on data of the same shape and classes",
            )
    plan = Plan.from_dict(run.read("plan.json"))
    chain = trace(model, torch.zeros(2, *bundle.input_shape))
    partition = group(chain, plan.bounds)
    index = results.head_index(head, plan.num_modules, report.accuracy.best_head)
    network = results.load_network(ModuleStore(run.modules), partition, job.config, index)
    network = results.as_trained(network, partition, index, plan.cache_dtype)
    accuracy = results.accuracy_of(network, bundle.test, bundle.input_shape, plan.micro_batch_size)
    same = bundle.digest == report.workload.get("digest")
    return {
        "accuracy": accuracy,
        "samples": len(bundle.test),
        "head": index,
        "data": workload.data,
        "matches_report": accuracy == report.modules[index].test_accuracy if same else None,
    }


def _complete(job: Job, report: Report) -> Report:
    """The report with its baselines, written as JSON and HTML."""
    if report.status == "completed":
        started = time.perf_counter()
        baselines = _baselines(job, report)
        seconds = dataclasses.replace(report.seconds, baseline=time.perf_counter() - started)
        report = dataclasses.replace(report, baselines=baselines, seconds=seconds)
    run = RunDir.open(job.run_dir)
    run.write("report.json", report.to_dict())
    run.write_text("report.html", to_html(report))
    return report


def _baselines(job: Job, report: Report) -> dict[str, BaselineReport]:
    batch = report.plan.batch_size
    predicted = Plan.from_dict(RunDir.open(job.run_dir).read("plan.json")).end_to_end_bytes
    reason = ""
    if job.baseline == "skip":
        reason = "not asked for"
    elif job.baseline == "auto" and predicted > (free := _free_memory()):
        reason = (
            f"predicted to need {format_size(predicted)}, {format_size(free)} are free; "
            "--baseline measure tries all the same"
        )
    if reason:
        skipped = BaselineReport(status="skipped", batch_size=batch, micro_batch_size=batch, reason=reason)
        return dict.fromkeys(BASELINES, skipped)
    scratch = scratch_beside(job.run_dir)
    return {
        name: measure_baseline(
            name, job.workload, job.config, batch_size=batch, scratch_dir=scratch, allocator=job.allocator
        )
        for name in BASELINES
    }


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _recorded(run: RunDir) -> Job:
    """The job that a run directory was made by. Raises RunDirError for a run of the library's."""
    record = run.read("config.json")
    workload: Mapping[str, Any] = record["workload"]
    if "model" not in workload:
        raise RunDirError(
            f"{run.path} was made by a program of its own: only that knows its model and data",
            hint="call Trainer.fit(..., resume=True) there",
        )
    names = [f.name for f in dataclasses.fields(Workload)]
    return Job(
        Workload(**{name: workload[name] for name in names}),
        TrainConfig(**record["config"]),
        run.path,
        baseline=workload["baseline"],
        command=workload["command"],
        allocator=workload["allocator"],
    )


def _check_digest(run: RunDir, data: DataBundle) -> None:
    before = run.read("config.json")["workload"].get("digest")
    if before != data.digest:
        raise RunDirError(
            f"the data have changed since {run.path} was started: {data.description}",
            hint="start a new run, or bring the same files back",
        )
