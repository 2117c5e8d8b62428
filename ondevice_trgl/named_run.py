"""A named job in the process that trains: datasets by name, modules from the run directory, baselines at the end."""

import dataclasses
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ondevice_trgl.baseline import measure_baseline
from ondevice_trgl.data.registry import DataBundle
from ondevice_trgl.device.meter import meter_for
from ondevice_trgl.errors import RunDirError
from ondevice_trgl.job import Job
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.report.html import to_html
from ondevice_trgl.report.model import BASELINES, NOT_YET, BaselineReport, Report, read_report
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
        return _complete(Job.of_run(run_dir, run.read("config.json")), report) if of_a_job and pending else report
    job = Job.of_run(run_dir, run.read("config.json"))
    if budget is not None:
        job = dataclasses.replace(job, config=dataclasses.replace(job.config, budget=budget))
    return sit(job, 0, callbacks)


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


def _check_digest(run: RunDir, data: DataBundle) -> None:
    before = run.read("config.json")["workload"].get("digest")
    if before != data.digest:
        raise RunDirError(
            f"the data have changed since {run.path} was started: {data.description}",
            hint="start a new run, or bring the same files back",
        )
