"""Whole jobs by name, as the command line runs them: plan, train, resume, evaluate.

Nothing here imports torch until a child process has made the plan and the first weights: until then this process is
small.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ondevice_trgl.child import ask
from ondevice_trgl.device.meter import own_peak_rss, process_tree_rss
from ondevice_trgl.errors import RunDirError, TrglError
from ondevice_trgl.job import Job
from ondevice_trgl.model.names import check_model_name, is_own
from ondevice_trgl.report.model import Report
from ondevice_trgl.runtime.run_dir import SCRATCH, RunDir, scratch_beside

if TYPE_CHECKING:
    from ondevice_trgl.runtime.callbacks import Callback


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


def resume_job(run_dir: Path, callbacks: "Sequence[Callback]" = ()) -> Report:
    """Go on where the run in `run_dir` stands. A finished run is reported as it is. Raises TrglError."""
    from ondevice_trgl import named_run

    return named_run.resume(run_dir, callbacks)


def evaluate_run(
    run_dir: Path, *, head: str = "best", data: str | None = None, data_root: Path | str | None = None
) -> dict[str, Any]:
    """Accuracy of a trained run on its own test set, or on that of another dataset of the same shape.

    `matches_report` says whether it equals the report's figure; None where that is of other data or another head.
    Raises RunDirError for a run that is not finished.
    """
    from ondevice_trgl import named_run

    return named_run.evaluate(run_dir, head=head, data=data, data_root=data_root)


def _prepared(job: Job, what: str) -> dict[str, Any]:
    """The answer of a child that makes the plan, or the whole run directory. Raises TrglError."""
    check_model_name(job.workload.model)
    place = scratch_beside(job.run_dir)
    try:  # of this process, as a child that is killed cannot clear up
        scratch = tempfile.TemporaryDirectory(prefix=SCRATCH, dir=place)
    except OSError as error:
        raise RunDirError(f"{place} cannot be written: {error.strerror}", hint="choose another --run-dir") from error
    with scratch as folder:
        request = {"what": what, "job": job.to_dict(), "caller_bytes": process_tree_rss(), "scratch": folder}
        built = {"peak_bytes": 0}
        if not is_own(job.workload.model):  # a process for what the model's code imports, another for the probe
            built = _asked({**request, "what": "build"})
        return _asked({**request, "built_peak_bytes": built["peak_bytes"]})


def _asked(request: dict[str, Any]) -> dict[str, Any]:
    ended = ask("ondevice_trgl.preparation", request)
    if ended.answer is None:
        failure = TrglError(
            f"planning failed: {ended.last_words}",
            hint="killed for want of memory, most likely" if ended.returncode == -9 else "",
        )
        failure.add_note(ended.stderr)
        raise failure
    return ended.answer
