"""One sitting of a run: from a prepared run directory to a report, whatever happens in between."""

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.device.environment import describe_environment
from ondevice_trgl.device.limit import NoLimit, limit_for
from ondevice_trgl.device.meter import PeakMeter
from ondevice_trgl.errors import TrglError
from ondevice_trgl.model.store import evict
from ondevice_trgl.report.model import Report
from ondevice_trgl.run import results
from ondevice_trgl.run.batches import Source
from ondevice_trgl.run.boundaries import Boundaries
from ondevice_trgl.run.budget import Budget
from ondevice_trgl.run.callbacks import Callback
from ondevice_trgl.run.guards import last_report
from ondevice_trgl.run.measured import Measured, Paused
from ondevice_trgl.run.prepare import Prepared
from ondevice_trgl.run.progress import Progress
from ondevice_trgl.run.scheduler import Scheduler


@dataclass
class Session:
    """What a sitting needs. `peak_before` is what setting up took at most, in this process tree."""

    prepared: Prepared
    data: dict[str, Source]
    callbacks: Sequence[Callback]
    pause: threading.Event
    meter: PeakMeter
    device: torch.device
    started: float
    peak_before: int
    workload: dict[str, Any]

    def __post_init__(self) -> None:
        limit = limit_for(self.device) if self.prepared.config.enforce else NoLimit()
        self.budget = Budget(self.prepared.plan.budget_bytes, limit, self.meter)

    def run(self) -> Report:
        """Train from wherever the run stands. Status completed or paused; an error leaves a report with "failed"."""
        p = self.prepared
        before = last_report(p.run)
        boundaries = Boundaries(
            self.data, p.plan.cache_tier, p.plan.cache_dtype, p.run.cache_folder(p.config.cache_dir)
        )
        progress = self._progress()
        scheduler = Scheduler(
            p.partition, p.heads, p.plan, p.config, p.store, p.run, boundaries, progress, self.meter, self.device,
            self.budget,
        )  # fmt: skip
        scheduler.peak_outside = max(self.peak_before, (before.measured_peak_bytes or 0) if before else 0)
        seconds_before = before.seconds.total if before else 0.0
        scheduler.pressures = [dict(item) for item in before.pressure] if before else []
        try:
            self.budget.start(p.plan.floor_bytes)
            scheduler.restore_callbacks()
            progress.call("on_fit_start")
            scheduler.fit()
            p.store.assemble(p.run.model, p.aliases)
            progress.call("on_fit_end")
            return self._report(scheduler, seconds_before, "completed")
        except Paused:
            return self._report(scheduler, seconds_before, "paused", "a pause was requested")
        except BaseException as error:
            with contextlib.suppress(TrglError):
                p.run.event("failed", error=str(error))
                self._report(scheduler, seconds_before, "failed", str(error))
            progress.call("on_exception", error)
            raise
        finally:
            self.budget.end()
            boundaries.close()
            p.run.clear_cache(p.config.cache_dir)
            evict(*p.partition.modules, *p.heads)
            release_memory()

    def _progress(self) -> Progress:
        p = self.prepared
        return Progress(
            run_dir=p.run.path,
            budget_bytes=p.plan.budget_bytes,
            laps=p.config.laps,
            num_modules=p.plan.num_modules,
            epochs=p.config.epochs,
            steps=len(self.data["train"].labels) // p.plan.batch_size,
            callbacks=self.callbacks,
            pause=self.pause,
        )

    def _report(self, scheduler: Scheduler, seconds_before: float, status: str, message: str = "") -> Report:
        p = self.prepared
        measured = [Measured(**p.store.position(k)["measured"]) for k in range(p.plan.num_modules)]
        labels = self.data["val"].labels if "val" in self.data else None
        report = results.make_report(
            run_dir=p.run.path,
            config=p.config,
            plan=p.plan,
            names=[module.label for module in p.partition.modules],
            measured=measured,
            accuracy=results.accuracies(p.store, measured, labels) if status == "completed" else None,
            meter=self.meter,
            peak_outside=max(scheduler.peak_outside, self.budget.note_peak()),
            status=status,
            message=message,
            total_seconds=time.perf_counter() - self.started + seconds_before,
            environment=describe_environment(threads=torch.get_num_threads(), device=str(self.device)),
            workload=self.workload,
            pressure=scheduler.pressures,
            budgets=[vars(period) for period in self.budget.periods] if len(self.budget.periods) > 1 else [],
        )
        p.run.write("report.json", report.to_dict())
        return report
