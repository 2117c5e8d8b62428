"""Whole jobs by name, as the command line runs them: plan, train, resume, evaluate."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ondevice_trgl.baseline import measure_baseline
from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.data.registry import DataBundle
from ondevice_trgl.device.meter import meter_for
from ondevice_trgl.errors import DataError, RunDirError
from ondevice_trgl.model.partition import group
from ondevice_trgl.model.store import ModuleStore
from ondevice_trgl.model.trace import trace
from ondevice_trgl.plan.planner import Plan
from ondevice_trgl.report.html import to_html
from ondevice_trgl.report.model import BASELINES, NOT_YET, BaselineReport, Report, read_report
from ondevice_trgl.runtime import results
from ondevice_trgl.runtime.callbacks import Callback
from ondevice_trgl.runtime.run_dir import RunDir
from ondevice_trgl.runtime.trainer import Trainer
from ondevice_trgl.runtime.workload import load_workload, scratch_beside
from ondevice_trgl.units import format_size


@dataclass(frozen=True)
class Job:
    """A workload, how to train it, and where the run goes."""

    workload: Workload
    config: TrainConfig
    run_dir: Path
    force: bool = False
    baseline: str = "auto"
    """auto: measure end-to-end where it is predicted to fit in what is free; measure: in any case; skip"""
    command: str = ""
    allocator: str = "system"
    """The settings of the C allocator that the caller has made, for the baselines to have the same."""


def plan_job(job: Job) -> Report:
    """What `train_job` would do; a report with status "planned". Raises BudgetInfeasibleError and other TrglErrors."""
    data, model = load_workload(job.workload, job.config.seed, scratch_beside(job.run_dir))
    trainer = Trainer(model, job.config, run_dir=job.run_dir)
    return trainer.plan_report(data.train, data.val, data.test, workload=_description(job, data))


def train_job(job: Job, callbacks: Sequence[Callback] = ()) -> Report:
    """Train, measure the baselines, write the report; status completed or paused. Raises TrglError."""
    RunDir.check(job.run_dir, force=job.force)
    scratch = scratch_beside(job.run_dir)
    with meter_for(torch.device("cpu")) as meter:
        data, model = load_workload(job.workload, job.config.seed, scratch)
        setup = meter.peak_bytes()
    trainer = Trainer(model, job.config, run_dir=job.run_dir, callbacks=callbacks, force=job.force)
    report = trainer.fit(data.train, data.val, data.test, workload=_description(job, data))
    return _complete(job, _with_setup(report, setup))


def resume_job(run_dir: Path, callbacks: Sequence[Callback] = ()) -> Report:
    """Go on where the run in `run_dir` stands. A finished run is reported as it is. Raises TrglError."""
    run = RunDir.open(run_dir)
    if (run_dir / "report.json").is_file() and (report := read_report(run_dir)).status == "completed":
        # without baselines: it was interrupted while those were measured
        of_a_job = "model" in report.workload
        pending = any(baseline.reason == NOT_YET for baseline in report.baselines.values())
        return _complete(_recorded(run), report) if of_a_job and pending else report
    job = _recorded(run)
    with meter_for(torch.device("cpu")) as meter:
        data, model = load_workload(job.workload, job.config.seed, scratch_beside(run_dir))
        setup = meter.peak_bytes()
    _check_digest(run, data)
    trainer = Trainer(model, job.config, run_dir=run_dir, callbacks=callbacks)
    report = trainer.fit(data.train, data.val, data.test, resume=True, workload=_description(job, data))
    return _complete(job, _with_setup(report, setup))


def evaluate_run(
    run_dir: Path, *, head: str = "best", data: str | None = None, data_root: Path | str | None = None
) -> dict[str, Any]:
    """Accuracy of a trained run on its own test set, or on that of another dataset of the same shape.

    `matches_report` says whether it equals the report's figure; None where that is of other data or another head.
    Raises RunDirError for a run that is not finished.
    """
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


def _with_setup(report: Report, setup: int) -> Report:
    """The measured peak of the whole process: building model and data counts too."""
    if report.budget_kind != "rss" or report.measured_peak_bytes is None:
        return report
    return dataclasses.replace(report, measured_peak_bytes=max(report.measured_peak_bytes, setup))


def _description(job: Job, data: DataBundle) -> dict[str, Any]:
    return {
        **job.workload.to_dict(),
        "description": data.description,
        "digest": data.digest,
        "input_shape": list(data.input_shape),
        "num_classes": data.num_classes,
        "samples": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        "seed": job.config.seed,
        "baseline": job.baseline,
        "command": job.command,
        "allocator": job.allocator,
    }


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
