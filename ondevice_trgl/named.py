"""A run of named model and data in the process that trains: from its run directory to its report and baselines."""

import dataclasses
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ondevice_trgl.baseline import measure_baseline
from ondevice_trgl.device.meter import meter_for
from ondevice_trgl.errors import RunDirError
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.report.html import to_html
from ondevice_trgl.report.model import BASELINES, NOT_YET, BaselineReport, Report, read_report
from ondevice_trgl.run.callbacks import Callback
from ondevice_trgl.run.guards import device_named, global_state_kept
from ondevice_trgl.run.opening import network_of, open_run, sources
from ondevice_trgl.run.record import RunRecord
from ondevice_trgl.run.run_dir import PLAN, RECORD, REPORT, RunDir, scratch_beside
from ondevice_trgl.run.session import Session
from ondevice_trgl.units import format_size
from ondevice_trgl.workload import build_for, load_bundle


def go_on(run_dir: Path, callbacks: Sequence[Callback], budget: str | int | None, peak_before: int) -> Report:
    """Train from wherever the run stands, then measure the baselines; see `jobs.resume_job`.

    `peak_before` is what this process took at most so far, as far as that is ours.
    """
    started = time.perf_counter()
    run = RunDir.open(run_dir)
    record = RunRecord.from_dict(run.read(RECORD))
    if (run_dir / REPORT).is_file() and (report := read_report(run_dir)).status == "completed":
        # without baselines: it was interrupted while those were measured
        pending = any(baseline.reason == NOT_YET for baseline in report.baselines.values())
        return _complete(run, record, report) if record.workload is not None and pending else report
    workload = record.named(run.path)
    config = record.config if budget is None else dataclasses.replace(record.config, budget=budget)
    device = device_named(config.device)
    with global_state_kept(config.threads), meter_for(device) as meter:
        bundle = load_bundle(workload, config.seed, scratch_beside(run_dir))
        if record.subject["digest"] != bundle.digest:
            raise RunDirError(
                f"the data have changed since {run_dir} was started: {bundle.description}",
                hint="start a new run, or bring the same files back",
            )
        data = sources(bundle.train, bundle.val, bundle.test)
        chain = network_of(run, lambda: build_for(workload, bundle, config.seed), bundle.input_shape, run_dir)
        opened = open_run(run_dir, data, config, chain)
        before = max(peak_before, meter.peak_bytes() if meter.kind == "rss" else 0)
        report = Session(opened, data, callbacks, threading.Event(), meter, device, started, before, frugal=True).run()
    return _complete(run, record, report)


def _complete(run: RunDir, record: RunRecord, report: Report) -> Report:
    """The report with its baselines, written as JSON and HTML."""
    if report.status == "completed":
        started = time.perf_counter()
        baselines = _baselines(run, record, report)
        seconds = dataclasses.replace(report.seconds, baseline=time.perf_counter() - started)
        report = dataclasses.replace(report, baselines=baselines, seconds=seconds)
    run.write(REPORT, report.to_dict())
    run.write_text("report.html", to_html(report))
    return report


def _baselines(run: RunDir, record: RunRecord, report: Report) -> dict[str, BaselineReport]:
    batch = report.plan.batch_size
    predicted = Plan.from_dict(run.read(PLAN)).end_to_end_bytes
    reason = ""
    if record.baseline == "skip":
        reason = "not asked for"
    elif record.baseline == "auto" and predicted > (free := _free_memory()):
        reason = (
            f"predicted to need {format_size(predicted)}, {format_size(free)} are free; "
            "--baseline measure tries all the same"
        )
    if reason:
        skipped = BaselineReport(status="skipped", batch_size=batch, micro_batch_size=batch, reason=reason)
        return dict.fromkeys(BASELINES, skipped)
    scratch = scratch_beside(run.path)
    return {
        name: measure_baseline(
            name,
            record.named(run.path),
            record.config,
            batch_size=batch,
            scratch_dir=scratch,
            allocator=record.allocator,
        )
        for name in BASELINES
    }


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)
