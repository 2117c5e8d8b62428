"""A run of named model and data in the process that trains: from its run directory to its report and baselines."""

import dataclasses
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ondevice_trgl.baseline import measure_baselines
from ondevice_trgl.data.user import is_callable_name
from ondevice_trgl.device.meter import meter_for
from ondevice_trgl.errors import RunDirError
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.policy import Stated
from ondevice_trgl.report.html import to_html
from ondevice_trgl.report.model import NOT_YET, Report, read_report
from ondevice_trgl.run.callbacks import Callback
from ondevice_trgl.run.guards import allowed, alone, device_named, global_state_kept
from ondevice_trgl.run.opening import network_of, open_run, sources
from ondevice_trgl.run.record import RunRecord
from ondevice_trgl.run.run_dir import PLAN, RECORD, REPORT, RunDir, scratch_beside
from ondevice_trgl.run.session import Session
from ondevice_trgl.workload import build_for, load_bundle


def go_on(run_dir: Path, callbacks: Sequence[Callback], budget: Stated | None, peak_before: int) -> Report:
    """Train from wherever the run stands, then measure the baselines; see `jobs.resume_job`.

    `peak_before` is what this process took at most so far, as far as that is ours.
    """
    started = time.perf_counter()
    run = RunDir.open(run_dir)
    record = run.load(RECORD, RunRecord.from_dict)
    if (run_dir / REPORT).is_file() and (report := read_report(run_dir)).status == "completed":
        # without baselines: it was interrupted while those were measured
        pending = any(baseline.reason == NOT_YET for baseline in report.baselines.values())
        return _complete(run, record, report) if record.workload is not None and pending else report
    workload = record.named(run.path)
    device = device_named(record.config.device)
    stated = budget if budget is not None else record.stated or record.config.budget
    assert stated is not None
    now = allowed(stated, device)
    config = dataclasses.replace(record.config, budget=now())
    with alone(), global_state_kept(config.threads), meter_for(device) as meter:
        bundle = load_bundle(workload, config.seed, scratch_beside(run_dir), task=config.asked_task)
        if record.subject["digest"] != bundle.digest:
            raise RunDirError(
                f"the data have changed since {run_dir} was started: {bundle.description}",
                hint=f"{bundle.name} has to return the same samples every time it is called: let it draw from a seed"
                if is_callable_name(bundle.name)
                else "start a new run, or bring the same files back",
            )
        data = sources(bundle.train, bundle.val, bundle.test)
        chain = network_of(run, lambda: build_for(workload, bundle, config.seed), data["train"], run_dir, config)
        opened = open_run(run_dir, data, config, chain)
        before = max(peak_before, meter.peak_bytes()) if meter.kind == "rss" else 0
        report = Session(
            opened, data, callbacks, threading.Event(), meter, device, started, before, ask=now, frugal=True
        ).run()
    return _complete(run, record, report)


def _complete(run: RunDir, record: RunRecord, report: Report) -> Report:
    """The report with its baselines, written as JSON and HTML."""
    if report.status == "completed":
        started = time.perf_counter()
        baselines = measure_baselines(
            record.named(run.path),
            record.config,
            run.load(PLAN, Plan.from_dict),
            wanted=record.baseline,
            scratch_dir=scratch_beside(run.path),
            allocator=record.allocator,
        )
        seconds = dataclasses.replace(report.seconds, baseline=time.perf_counter() - started)
        report = dataclasses.replace(report, baselines=baselines, seconds=seconds)
    run.write(REPORT, report.to_dict())
    run.write_text("report.html", to_html(report))
    return report
