"""Ways to train beside each other on the same work: plain, end-to-end three times over, and TRGL at several budgets.

Each is measured in a process of its own, all in turn and then all again, so that what the machine does meanwhile falls
on every one alike. Nothing here imports torch.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ondevice_trgl.device.allocator import tcmalloc_library
from ondevice_trgl.device.start import no_tcmalloc, plain_environment, tuned_environment
from ondevice_trgl.errors import BudgetExceededError, BudgetInfeasibleError, RunDirError, TrglError, UsageError
from ondevice_trgl.job import ACCUMULATE, BaselineRequest, Job
from ondevice_trgl.processes import ask, why_not
from ondevice_trgl.report.comparison import Comparison, Measurement, Row
from ondevice_trgl.report.model import BaselineReport, Report
from ondevice_trgl.report.table import format_seconds
from ondevice_trgl.run.run_dir import RunDir
from ondevice_trgl.setup.steps import check_names, staging_folder
from ondevice_trgl.units import format_size, parse_size

_END_TO_END = {
    "plain": "plain end-to-end",
    "e2e": "tuned end-to-end",
    "e2e_accumulate": "with accumulation",
    "e2e_checkpoint": "with checkpoints",
}


class AskIn(Protocol):
    """`processes.ask`, or what stands in for it."""

    def __call__(
        self, name: str, request: dict[str, Any], *, environment: Mapping[str, str] | None = None, lean: bool = True
    ) -> dict[str, Any]: ...


def compare(
    job: Job,
    budgets: Sequence[str | int],
    *,
    keep: bool = False,
    accumulate: int = ACCUMULATE,
    repeat: int = 1,
    say: Callable[[str], None] = lambda line: None,
    ask: AskIn = ask,
) -> Comparison:
    """Measure every way to train `job` once, then all again, `repeat` times; the budget of `job` is not used.

    The runs of TRGL go to temporary folders beside `job.run_dir` and are cleared away; with `keep` they stay in it, one
    folder a run. A row that could not be measured says why and is not tried again. `say` is told of each.
    Memory: that of a Python process without torch; the processes that are measured run one at a time.
    Raises UsageError for what is wrong in the request, before anything is measured as far as that can be told.
    """
    _check_count("accumulate", accumulate, least=2)
    _check_count("repeat", repeat, least=1)
    sizes = _distinct(budgets)
    if job.allocator == "tcmalloc" and tcmalloc_library() is None:
        raise no_tcmalloc()
    check_names(job.workload)
    rows = [*(Row(name=name, label=label) for name, label in _END_TO_END.items())]
    rows += [Row(name=f"trgl {text}", label=f"TRGL, {text}", budget_bytes=size) for text, size in sizes.items()]
    folders = {(row.name, turn): _run_dir(job, row, turn, repeat) for row in rows for turn in range(repeat)}
    if keep:
        _check_folders(job, [folders[row.name, turn] for row in rows if row.budget_bytes for turn in range(repeat)])
    measure = _Measuring(job, accumulate, ask)
    for number, (index, turn) in enumerate(_in_turn(len(rows), repeat), 1):
        row = rows[index]
        if row.runs and not row.is_measured:
            continue
        say(f"[{number}/{len(rows) * repeat}] {row.label} ...")
        with staging_folder(job.run_dir) as scratch:
            run = measure(row, folders[row.name, turn] if keep else scratch / "run", scratch)
        rows[index] = dataclasses.replace(row, runs=(*row.runs, run), note=measure.note(row, run))
        say(f"[{number}/{len(rows) * repeat}] {row.label}: {_outcome(run)}")
    config = job.config.to_dict()
    del config["budget"]  # each row has its own
    return Comparison(
        rows=tuple(rows), repeat=repeat, workload=job.workload.to_dict(), config=config, command=job.command
    )


def _in_turn(rows: int, repeat: int) -> Iterator[tuple[int, int]]:
    return ((index, turn) for turn in range(repeat) for index in range(rows))


def _check_count(name: str, value: int, *, least: int) -> None:
    if value < least:
        raise UsageError(
            f"{name} = {value}: expected a whole number of at least {least}",
            hint=f"leave --{name} out for {ACCUMULATE if name == 'accumulate' else 1}",
        )


def _distinct(budgets: Sequence[str | int]) -> dict[str, int]:
    """Bytes by what was written. Raises SizeError, UsageError for one that is there twice."""
    if not budgets:
        raise UsageError("no memory budget: say how much TRGL may take", hint="for example --budget 600MB,1GB")
    sizes: dict[str, int] = {}
    for budget in budgets:
        size = parse_size(budget, what="budget")
        if size in sizes.values():
            raise UsageError(
                f"budget {str(budget).strip()!r} is there twice: {', '.join(str(text) for text in budgets)}",
                hint="name each size once; --repeat measures every row again",
            )
        sizes[str(budget).strip()] = size
    return sizes


def _run_dir(job: Job, row: Row, turn: int, repeat: int) -> Path:
    return job.run_dir / (row.name.replace(" ", "-") + (f"-{turn + 1}" if repeat > 1 else ""))


def _check_folders(job: Job, folders: Sequence[Path]) -> None:
    if job.run_dir.exists() and not job.run_dir.is_dir():
        raise RunDirError(f"{job.run_dir} is a file, expected a folder for the runs", hint="choose another --run-dir")
    for folder in folders:
        RunDir.check(folder, force=job.force, cache_dir=job.config.cache_dir)


class _Measuring:
    """Asks processes of their own, and makes a Measurement of whatever comes back."""

    def __init__(self, job: Job, accumulate: int, ask: AskIn) -> None:
        self._job, self._accumulate, self._ask = job, accumulate, ask
        self._tuned = tuned_environment(os.environ, job.allocator)
        self._plain = plain_environment(os.environ)

    def __call__(self, row: Row, run_dir: Path, scratch: Path) -> Measurement:
        try:
            return self._end_to_end(row.name, scratch) if row.budget_bytes is None else self._trgl(row, run_dir)
        except UsageError:
            raise  # what was asked for is wrong, whoever is asked
        except BudgetInfeasibleError as refusal:
            return Measurement(
                status="refused",
                reason=f"{refusal.message}; {refusal.hint}",
                smallest_feasible_budget_bytes=refusal.smallest_feasible_budget_bytes,
            )
        except BudgetExceededError as error:
            return Measurement(status="did_not_fit", reason=error.message)
        except TrglError as error:
            status, reason = why_not(error)
            return Measurement(status=status, reason=reason)

    def _end_to_end(self, name: str, scratch: Path) -> Measurement:
        plain = name == "plain"
        request = BaselineRequest(
            name=name,
            workload=self._job.workload,
            config=self._job.config,
            batch_size=self._job.config.batch_size,
            scratch_dir=scratch,
            allocator="system" if plain else self._job.allocator,
            accumulate=self._accumulate if name == "e2e_accumulate" else 1,
        )
        environment = self._plain if plain else self._tuned
        report = BaselineReport(**self._ask("baseline", request.to_dict(), environment=environment, lean=not plain))
        return Measurement(
            status=report.status,
            reason=report.reason,
            batch_size=report.batch_size,
            micro_batch_size=report.micro_batch_size,
            peak_bytes=report.measured_peak_bytes,
            floor_bytes=report.floor_bytes,
            seconds_per_epoch=report.seconds_per_epoch,
        )

    def _trgl(self, row: Row, run_dir: Path) -> Measurement:
        config = dataclasses.replace(self._job.config, budget=row.budget_bytes)
        job = dataclasses.replace(self._job, config=config, run_dir=run_dir, baseline="skip")
        report = Report.from_dict(self._ask("train", job.to_dict(), environment=self._tuned))
        if report.status != "completed" or report.measured_peak_bytes is None:
            return Measurement(status="failed", reason=f"the run is {report.status}: {report.message or 'no peak'}")
        epoch, seconds = report.seconds.per_epoch, report.seconds
        spent = seconds.training + seconds.cache
        share = seconds.training / spent if spent else 1.0  # every module has as many epochs as any other
        sizes = [module.micro_batch_size for module in report.heads if module.micro_batch_size is not None]
        return Measurement(
            status="measured",
            batch_size=report.plan.batch_size,
            micro_batch_size=max(sizes, default=report.plan.micro_batch_size),
            peak_bytes=report.measured_peak_bytes,
            floor_bytes=report.floor_bytes,
            seconds_per_epoch=epoch,
            training_seconds_per_epoch=None if epoch is None else epoch * share,
            caching_seconds_per_epoch=None if epoch is None else epoch * (1.0 - share),
            predicted_peak_bytes=report.predicted_peak_bytes,
            modules=report.plan.num_modules,
            environment=report.environment,
        )

    def note(self, row: Row, run: Measurement) -> str:
        """What a reader has to know of the row beside its figures."""
        if row.name != "e2e_accumulate" or not run.batch_size or not run.micro_batch_size:
            return row.note
        count = run.batch_size // run.micro_batch_size
        if count == self._accumulate:
            return f"{count} micro-batches of {run.micro_batch_size}"
        return (
            f"{count} micro-batch{'es' if count > 1 else ''} of {run.micro_batch_size}: "
            f"a batch of {run.batch_size} cannot be cut into {self._accumulate}"
        )


def _outcome(run: Measurement) -> str:
    if run.peak_bytes is None:
        return f"{run.status.replace('_', ' ')}: {run.reason}"
    return f"peak {format_size(run.peak_bytes)}, {format_seconds(run.seconds_per_epoch)} an epoch"
