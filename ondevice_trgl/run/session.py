"""One sitting of a run: from a prepared run directory to a report, whatever happens in between."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ondevice_trgl.data.augment import Augmented
from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.device.container import Watch
from ondevice_trgl.device.environment import describe_environment
from ondevice_trgl.device.host import left_bytes
from ondevice_trgl.device.limit import NoLimit, lacks_memory, limit_for
from ondevice_trgl.device.meter import PeakMeter
from ondevice_trgl.device.randomness import Randomness, with_numpys
from ondevice_trgl.device.tree import TreeMeter
from ondevice_trgl.errors import TrglError
from ondevice_trgl.model.store import evict, parameter_count
from ondevice_trgl.report.model import Report, SecondsReport
from ondevice_trgl.run import results
from ondevice_trgl.run.batches import Source
from ondevice_trgl.run.boundaries import Boundaries
from ondevice_trgl.run.budget import Budget
from ondevice_trgl.run.callbacks import Callback
from ondevice_trgl.run.checkpointer import Checkpointer
from ondevice_trgl.run.conditions import Conditions
from ondevice_trgl.run.context import Context
from ondevice_trgl.run.guards import last_report
from ondevice_trgl.run.lock import held
from ondevice_trgl.run.measured import Paused
from ondevice_trgl.run.opening import Opened
from ondevice_trgl.run.parallel import Parallel
from ondevice_trgl.run.position import Position
from ondevice_trgl.run.progress import Progress
from ondevice_trgl.run.run_dir import REPORT, RunDir
from ondevice_trgl.run.scheduler import Scheduler
from ondevice_trgl.run.timeline import Timeline


@dataclass
class Session:
    """What a sitting needs. `peak_before` is what the process took at most so far."""

    opened: Opened
    data: dict[str, Source]
    callbacks: Sequence[Callback]
    pause: threading.Event
    meter: PeakMeter
    device: torch.device
    started: float
    peak_before: int
    ask: Callable[[], int] | None = None
    """Gives the budget, asked between steps; None where that of the plan holds until another is requested."""
    frugal: bool = False
    """See `Budget`: the process is ours alone, no app's."""

    def __post_init__(self) -> None:
        self._watch = Watch()
        self._waits: Callable[[str], None] = lambda why: None
        # refused before anything is started that would have to be ended
        self._conditions = Conditions(self.opened.config, self.pause.is_set, lambda why: self._waits(why))
        self._own_code = bool(self.opened.record.no_blueprint)
        if self._own_code:
            with_numpys()
        limit = limit_for(self.device) if self.opened.config.enforce else NoLimit()
        if self.meter.kind == "rss":
            self.meter = TreeMeter(self.meter)
        self.budget = Budget(self.opened.plan.budget_bytes, limit, self.meter, frugal=self.frugal, ask=self.ask)

    def _between_steps(self, progress: Progress) -> None:
        self._timeline.look(progress.module)
        self._conditions.rest()

    def _mended(self) -> dict[str, list[str]]:
        return {"mended": list(self.opened.mended)} if self.opened.mended else {}

    def _room_for_pages(self) -> int:
        """Of what is free beside the budget, the half: others may come."""
        return max(0, left_bytes() - (self.budget.bytes if self.meter.kind == "rss" else 0)) // 2

    def run(self) -> Report:
        """Train from wherever the run stands. Status completed or paused; an error leaves a report with "failed".

        Raises RunDirError, and leaves everything as it is, where another process trains it.
        """
        with held(self.opened.run.path):
            before = Randomness.now(torch.device("cpu"))
            try:
                return self._run()
            finally:
                if self._own_code:  # else they were an app's alone, and went on
                    before.restore(torch.device("cpu"))

    def _run(self) -> Report:
        p = self.opened
        before = last_report(p.run)
        boundaries = Boundaries(
            self.data,
            p.plan.cache_tier,
            p.plan.cache_dtype,
            p.run.cache_folder(p.config.cache_dir),
            Augmented.of(self.data["train"], p.config),
            for_gpu=self.device.type == "cuda",
            room=self._room_for_pages,
            by_chunk=p.config.shuffle == "chunks",
        )
        progress = self._progress()
        progress.rest, progress.rested = partial(self._between_steps, progress), self._conditions.rested
        spent = before.seconds if before else SecondsReport()
        self._timeline = Timeline(self.meter.current_bytes, before.timeline if before else (), spent.total)
        self._waits = partial(_waits, progress, p.run)
        context = Context(
            p.partition, p.heads, p.plan, p.config, p.store, p.run, boundaries, progress, self.meter, self.device,
            self.budget, p.task, self._own_code,
        )  # fmt: skip
        kind = Parallel if p.config.schedule == "parallel" else Scheduler
        scheduler = kind(context, Checkpointer(context))
        so_far = max(self.peak_before, p.plan.set_up_bytes)
        self.budget.periods[0].measured_peak_bytes = so_far
        self._earlier = _stretches(before)
        scheduler.peak_outside = max(so_far, (before.measured_peak_bytes or 0) if before else 0)
        scheduler.pressures = [dict(item) for item in before.pressure] if before else []
        completed = False
        try:
            self.budget.start(p.plan.floor_bytes)
            scheduler.checkpointer.restore((before.written_bytes or 0) if before else 0)
            progress.call("on_fit_start")
            scheduler.go_lower()
            scheduler.fit()
            p.store.forget()
            if scheduler.stopped_behind is None:
                p.store.assemble(p.run.model, p.aliases, p.record.metadata)
                p.run.drop_staged()
            progress.call("on_fit_end")
            completed = True
            return self._report(scheduler, spent, "completed")
        except Paused:
            return self._report(scheduler, spent, "paused", "a pause was requested")
        except BaseException as error:
            self.budget.limit.lift()
            if isinstance(error, Exception) and not isinstance(error, TrglError) and lacks_memory(error):
                error = self.budget.exceeded(f"{type(error).__name__} between two steps").with_traceback(
                    error.__traceback__
                )
            with contextlib.suppress(TrglError):
                p.run.event("failed", error=str(error))
                self._report(scheduler, spent, "failed", str(error))
            progress.call("on_exception", error)
            raise error
        finally:
            scheduler.sitting.end()
            self.budget.end()
            boundaries.close(keep=not completed)  # the next sitting goes on from it
            if completed:
                p.run.clear_cache(p.config.cache_dir)
            else:
                with contextlib.suppress(OSError):
                    boundaries.folder.rmdir()  # where nothing was sealed
            evict(*p.partition.modules, *p.heads)
            release_memory()

    def _budgets(self) -> list[dict[str, int]]:
        """Every stretch under one budget, earlier sittings' included; [] where there was one budget all along."""
        stretches = [*self._earlier, *(vars(period) for period in self.budget.periods)]
        return stretches if len({stretch["budget_bytes"] for stretch in stretches}) > 1 else []

    def _progress(self) -> Progress:
        p = self.opened
        return Progress(
            run_dir=p.run.path,
            budget_bytes=p.plan.budget_bytes,
            laps=p.config.laps,
            num_modules=p.plan.num_parts,
            lengths=self._lengths(),
            steps=len(self.data["train"].labels) // p.plan.batch_size,
            callbacks=self.callbacks,
            metric=p.task.metric,
            pause=self.pause,
        )

    def _lengths(self) -> tuple[float, ...]:
        """Of what is trained one after another in a lap; the classifier is taken for as long as a module."""
        plan, config = self.opened.plan, self.opened.config
        mean = float(config.mean_epochs(plan.num_trained))
        modules = [mean] if config.schedule == "parallel" else [1.0] * plan.passed
        if config.schedule != "parallel":
            modules += [float(plan.epochs(config, k)) for k in range(plan.passed, plan.num_modules)]
        return (*modules, mean) if plan.classifier else tuple(modules)

    def _report(self, scheduler: Scheduler, spent: SecondsReport, status: str, message: str = "") -> Report:
        p = self.opened
        measured = [
            dataclasses.replace(
                Position.of(p.store, k).measured,
                params=parameter_count(module, head),
                frozen=module.frozen,
                passed=module.passed,
            )
            for k, (module, head) in enumerate(zip(p.partition.modules, p.heads, strict=True))
        ]
        labels = self.data["val"].labels if "val" in self.data else None
        report = results.make_report(
            run_dir=p.run.path,
            config=p.config,
            plan=p.plan,
            names=[module.label for module in p.partition.modules],
            measured=measured,
            accuracy=results.accuracies(p.store, p.plan, p.config.head, measured, labels, p.task)
            if status == "completed"
            else None,
            meter=self.meter,
            peak_outside=max(scheduler.peak_outside, self.budget.note_peak()),
            status=status,
            message=message,
            total_seconds=time.perf_counter() - self.started + spent.total,
            checkpoint_seconds=scheduler.checkpointer.seconds + spent.checkpoint,
            environment=describe_environment(threads=self.budget.hands.threads, device=str(self.device)),
            workload=p.record.reported,
            preprocessing=p.record.preprocessing,
            pressure=scheduler.pressures,
            budgets=self._budgets(),
            system=self._watch.since() | self.meter.facts() | self._conditions.facts() | self._mended(),
            stopped_behind=scheduler.stopped_behind,
            written_bytes=scheduler.checkpointer.written_bytes,
            flash_endurance_bytes=p.record.flash_endurance_bytes,
            timeline=self._timeline.records(),
        )
        p.run.write(REPORT, report.to_dict())
        return report


def _waits(progress: Progress, run: RunDir, why: str) -> None:
    progress.waiting = why
    run.event("waits" if why else "goes_on", why=why)
    progress.call("on_wait")


def _stretches(before: Report | None) -> list[dict[str, int]]:
    """The budgets of earlier sittings, and what was measured under each."""
    if before is None or before.measured_peak_bytes is None:
        return []
    if before.budgets:
        return [dict(stretch) for stretch in before.budgets]
    return [{"budget_bytes": before.budget_bytes, "measured_peak_bytes": before.measured_peak_bytes}]
