"""Whole jobs by name, as the command line runs them: plan, train, resume, evaluate.

Nothing here imports torch until a child process has made the plan and the first weights: until then this process is
small.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ondevice_trgl.device.host import usable_ram_bytes
from ondevice_trgl.device.meter import own_peak_rss, process_tree_rss
from ondevice_trgl.device.pages import release_code_pages
from ondevice_trgl.errors import BudgetInfeasibleError, RunDirError, TrglError
from ondevice_trgl.job import Job
from ondevice_trgl.model.names import check_model_name
from ondevice_trgl.processes import ask
from ondevice_trgl.report.model import Report
from ondevice_trgl.run.run_dir import SCRATCH, RunDir, scratch_beside

if TYPE_CHECKING:
    from ondevice_trgl.run.callbacks import Callback


_WAITING_CODE_BYTES = 5_000_000
"""Code that asking a child brings back into memory."""
_MOST_TRIES = 8


def plan_job(job: Job) -> Report:
    """What `train_job` would do; a report with status "planned". Raises BudgetInfeasibleError and other TrglErrors."""
    return Report.from_dict(_prepared(job, "plan")["report"])


def train_job(job: Job, callbacks: "Sequence[Callback]" = ()) -> Report:
    """Train, measure the baselines, write the report; status completed or paused. Raises TrglError.

    Model, plan and first weights are made by a child process, so that this one holds no more than training needs.
    """
    RunDir.check(job.run_dir, force=job.force)
    made = _prepared(job, "create")
    ours = "torch" not in sys.modules
    from ondevice_trgl import named_run

    importing = own_peak_rss() if ours else 0  # what a program of the caller's held before is not ours
    return named_run.sit(job, max(made["peak_bytes"], importing), callbacks)


def resume_job(run_dir: Path, callbacks: "Sequence[Callback]" = (), *, budget: str | int | None = None) -> Report:
    """Go on where the run in `run_dir` stands, within another budget where one is given.

    A finished run is reported as it is. Raises TrglError.
    """
    from ondevice_trgl import named_run

    return named_run.resume(run_dir, callbacks, budget)


def evaluate_run(
    run_dir: Path,
    *,
    head: str = "best",
    data: str | None = None,
    data_root: Path | str | None = None,
    budget: str | int | None = None,
) -> dict[str, Any]:
    """Accuracy of a trained run on its own test set, or on that of another dataset of the same shape.

    One module in memory at a time, held to `budget` or else to the run's own. `head` is "best", "last", an index, or
    "ensemble": the mean of the class probabilities of all heads. "heads" has the accuracy of every head on the way.
    `matches_report` says whether it equals the report's figure; None where that is of other data, or there is none.
    Raises RunDirError for a run that is not finished, UsageError, DataError, BudgetExceededError, StorageError.
    """
    ours = "torch" not in sys.modules
    from ondevice_trgl.evaluate import evaluate

    importing = own_peak_rss() if ours else 0  # what a program of the caller's held before is not ours
    return evaluate(run_dir, importing, head=head, data=data, data_root=data_root, budget=budget)


def _prepared(job: Job, what: str) -> dict[str, Any]:
    """The answer of a child that makes the plan, or the whole run directory. Raises TrglError.

    A BudgetInfeasibleError names a budget that a plan was made for, as far as this machine has the memory to try it.
    """
    try:
        return _set_up(job, what)
    except BudgetInfeasibleError as refusal:
        raise _tried(job, refusal) from refusal


def _tried(job: Job, refusal: BudgetInfeasibleError) -> BudgetInfeasibleError:
    """`refusal` with a budget that was tried: what lacks memory cannot tell how much more it would have taken."""
    needed, room = refusal.smallest_feasible_budget_bytes, usable_ram_bytes()
    for attempt in range(_MOST_TRIES):
        if needed > room:
            break
        try:
            _set_up(dataclasses.replace(job, config=dataclasses.replace(job.config, budget=needed)), "plan")
            break
        except BudgetInfeasibleError as more:
            raised = needed + needed * 2**attempt // 100  # 1 %, 2 %, 4 %, ...
            needed = -(-max(raised, more.smallest_feasible_budget_bytes) // 1_000_000) * 1_000_000
    if needed == refusal.smallest_feasible_budget_bytes:
        return refusal
    tail = refusal.hint.partition(";")[2]
    return BudgetInfeasibleError(
        refusal.message,
        budget_bytes=refusal.budget_bytes,
        smallest_feasible_budget_bytes=needed,
        hint=f"the smallest feasible budget is {needed // 1_000_000}MB{tail and ';'}{tail}",
    )


def _set_up(job: Job, what: str) -> dict[str, Any]:
    """One try at what `_prepared` does, each step in a child process of its own."""
    check_model_name(job.workload.model)
    place = scratch_beside(job.run_dir)
    try:  # of this process, as a child that is killed cannot clear up
        scratch = tempfile.TemporaryDirectory(prefix=SCRATCH, dir=place)
    except OSError as error:
        raise RunDirError(f"{place} cannot be written: {error.strerror}", hint="choose another --run-dir") from error
    with scratch as folder:
        release_code_pages()  # while this process waits for its children it needs next to none
        waiting = process_tree_rss() + _WAITING_CODE_BYTES
        request = {"what": what, "job": job.to_dict(), "caller_bytes": waiting, "scratch": folder}
        measured = _asked("ondevice_trgl.measuring", request)
        request["modules"] = sorted(name for name in sys.modules if name.split(".")[0] in ("ondevice_trgl", "rich"))
        request["measuring_peak_bytes"] = measured["peak_bytes"]
        made = _asked("ondevice_trgl.preparation", request)
        return {**made, "peak_bytes": max(measured["peak_bytes"], made["peak_bytes"])}


def _asked(module: str, request: dict[str, Any]) -> dict[str, Any]:
    ended = ask(module, request)
    if ended.answer is None:
        failure = TrglError(
            f"planning failed: {ended.last_words}",
            hint="killed for want of memory, most likely" if ended.returncode == -9 else "",
        )
        failure.add_note(ended.stderr)
        raise failure
    return ended.answer
