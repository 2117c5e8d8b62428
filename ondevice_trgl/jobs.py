"""What the command line's commands do: plan, train, resume, evaluate, by name.

Nothing here imports torch until the model is staged and the plan is made: until then this process is small.
`python -m ondevice_trgl.jobs` trains the job of one JSON request on stdin and prints the report as one JSON answer.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ondevice_trgl.data.entries import shown
from ondevice_trgl.data.listing import files_in
from ondevice_trgl.data.pictures import files_held_out, is_pictures, same_data
from ondevice_trgl.device.allocator import tune
from ondevice_trgl.device.lean import imports_kept
from ondevice_trgl.device.meter import own_peak_rss
from ondevice_trgl.errors import DataError
from ondevice_trgl.job import Job
from ondevice_trgl.policy import Stated
from ondevice_trgl.processes import Ask, Told, answer, ask
from ondevice_trgl.report.model import Report, read_report
from ondevice_trgl.run.conditions import check_conditions
from ondevice_trgl.run.record import RunRecord
from ondevice_trgl.run.run_dir import RECORD, REPORT, RunDir, read_json
from ondevice_trgl.run.trained import TrainedRun
from ondevice_trgl.setup.steps import prepare_for, set_up, settled, staging_folder

if TYPE_CHECKING:
    from ondevice_trgl.run.callbacks import Callback


def plan_job(job: Job, *, ask: Ask = ask, told: Told | None = None) -> Report:
    """What `train_job` would do; a report with status "planned". Raises BudgetInfeasibleError and other TrglErrors.

    `told` is given how far it is with decoding pictures.
    """
    with settled(job.config) as budget, staging_folder(job.run_dir) as folder:
        set_up(job.within(*budget), folder, ask, weights=False, told=told)
        return read_report(folder)


def train_job(
    job: Job,
    callbacks: "Sequence[Callback]" = (),
    *,
    ask: Ask = ask,
    told: Told | None = None,
) -> Report:
    """Stage, plan, train, measure the baselines, write the report; status completed or paused. Raises TrglError.

    `told` is given how far it is with decoding pictures, and what the data turned out to be, before training starts.
    """
    RunDir.check(job.run_dir, force=job.force, cache_dir=job.config.cache_dir)
    check_conditions(job.config)
    with settled(job.config) as budget, staging_folder(job.run_dir) as folder:
        set_up(job.within(*budget), folder, ask, told=told)
        if told is not None:
            told(f"data: {read_json(folder / RECORD).get('subject', {}).get('description', '')}")
        RunDir.adopt(folder, job.run_dir, force=job.force)
    return _go_on(job.run_dir, callbacks)


def resume_job(
    run_dir: Path, callbacks: "Sequence[Callback]" = (), *, budget: Stated | None = None, ask: Ask = ask
) -> Report:
    """Go on where the run in `run_dir` stands, within another budget where one is given.

    A finished run is reported as it is. Raises TrglError.
    """
    own = _own_pictures(run_dir)
    if own is not None and (run_dir / REPORT).is_file() and read_report(run_dir).status != "completed":
        # what was decoded for it may have made room since; this process is small now
        prepare_for(run_dir, own, budget, ask)
    return _go_on(run_dir, callbacks, budget)


def _go_on(run_dir: Path, callbacks: "Sequence[Callback]" = (), budget: Stated | None = None) -> Report:
    """As `resume_job`, where the pictures have been decoded."""
    ours = "torch" not in sys.modules  # what a program of the caller's held before is not ours
    with imports_kept() if ours else contextlib.nullcontext():
        from ondevice_trgl import named

    return named.go_on(run_dir, callbacks, budget, own_peak_rss() if ours else 0)


def evaluate_run(
    run_dir: Path,
    *,
    head: str = "best",
    data: str | None = None,
    data_root: Path | str | None = None,
    budget: Stated | None = None,
    by_order: bool = False,
    ask: Ask = ask,
) -> dict[str, Any]:
    """Accuracy of a trained run on its own test set, or on another dataset as `load_holdout` finds it.

    Its own data, however their path is written, are those of no `data`; that they changed since training is told. Other
    data are normalised as the training's were, and their classes matched by name, or by order with `by_order`.

    One module in memory at a time, held to `budget` or else to the run's own. `head` is "best", "last", an index, or
    "ensemble": the mean of the class probabilities of all heads. "heads" has the accuracy of every head on the way.
    `matches_report` says whether it equals the report's figure; None where that is of other data, or there is none.
    Of a run that is not finished, those heads that are. Raises RunDirError where none is, UsageError, DataError,
    BudgetExceededError, StorageError.
    """
    ours = "torch" not in sys.modules
    _check_head(run_dir, head)
    own = _own_pictures(run_dir)
    if own is not None and (data is None or same_data(data, own)):
        place = Path(own.partition(":")[2])
        if not place.exists():
            raise DataError(
                f"{shown(place)} is gone, where the pictures are that the run was trained with",
                hint="bring it back, or give other pictures: --data folder:PATH measures all of them",
            )
        prepare_for(run_dir, own, budget, ask)
    elif data is not None and is_pictures(data):
        prepare_for(run_dir, lambda task: files_held_out(data, task), budget, ask)
    from ondevice_trgl.evaluate import evaluate

    importing = own_peak_rss() if ours else 0
    return evaluate(run_dir, importing, head=head, data=data, data_root=data_root, budget=budget, by_order=by_order)


def predict_run(
    run_dir: Path,
    paths: Sequence[Path],
    *,
    head: str = "best",
    top: int = 1,
    budget: Stated | None = None,
    ask: Ask = ask,
) -> dict[str, Any]:
    """Class and confidence (softmax) of picture files, and of all in folders, by a trained run.

    Read as in training, one module in memory at a time, within `budget` or else the run's own. "predictions" has of
    each file the best class, and under "top" the best `top` ones. Raises as `evaluate_run`.
    """
    ours = "torch" not in sys.modules
    _check_head(run_dir, head)
    prepare_for(run_dir, lambda task: [path for path, _ in files_in(paths).files], budget, ask)
    from ondevice_trgl.evaluate import predict

    importing = own_peak_rss() if ours else 0
    return predict(run_dir, importing, paths, head=head, top=top, budget=budget)


def _own_pictures(run_dir: Path) -> str | None:
    """The name of the data that the run was made with, where those are picture files. Raises RunDirError."""
    record = RunDir.open(run_dir).load(RECORD, RunRecord.from_dict)
    if record.workload is None or not is_pictures(record.workload.data):
        return None
    return record.named(run_dir).data


def _check_head(run_dir: Path, head: str) -> None:
    """Raises RunDirError where `run_dir` is no run with a finished head, UsageError where it has no such head."""
    trained = TrainedRun.open(run_dir)
    if head != "ensemble":
        trained.head(head)


def _train(request: dict[str, Any]) -> dict[str, Any]:
    job = Job.from_dict(request)
    tune(job.allocator)
    return train_job(job).to_dict()


if __name__ == "__main__":
    raise SystemExit(answer(_train))
