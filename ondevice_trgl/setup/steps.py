"""Prepare pictures, stage and plan, asked of short-lived processes: what those take is gone before training starts.

Imports no torch: until the plan is made, the process that will train is small.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.data.decode import Fit
from ondevice_trgl.data.pictures import fit_for, is_pictures
from ondevice_trgl.data.preprocessing import Preprocessing
from ondevice_trgl.device.allowance import Allowance
from ondevice_trgl.device.host import usable_ram_bytes
from ondevice_trgl.device.pages import release_code_pages
from ondevice_trgl.device.start import patient_environment, plain_environment
from ondevice_trgl.device.tree import process_tree_rss
from ondevice_trgl.errors import BudgetInfeasibleError, ProcessDiedError, RunDirError, StorageError, UsageError
from ondevice_trgl.job import Job
from ondevice_trgl.model.names import check_model_name
from ondevice_trgl.policy import Stated
from ondevice_trgl.processes import Ask, Told, ask
from ondevice_trgl.report.model import read_report
from ondevice_trgl.run.cleaning import clean_scratch
from ondevice_trgl.run.lock import held
from ondevice_trgl.run.record import RunRecord
from ondevice_trgl.run.run_dir import RECORD, SCRATCH, RunDir, scratch_beside
from ondevice_trgl.setup.requests import PlanRequest, StageRequest, Took, too_large

_WAITING_CODE_BYTES = 5_000_000
"""Code that asking a child brings back into memory."""
_HOLDER_BYTES = 200_000_000
"""What a process holds that sets up or trains, before its first module."""
_MOST_TRIES = 8
_SURELY_LOCKED_SECONDS = 60.0
_LACKING = ("MemoryError", "allocat", "bad_alloc")
"""What the last words of a process are that was refused memory."""


@contextlib.contextmanager
def staging_folder(run_dir: Path) -> Iterator[Path]:
    """A temporary folder on the disk of `run_dir`, for `RunDir.adopt` to empty. Raises RunDirError.

    What processes left there that were killed while they set up is removed.
    """
    place = scratch_beside(run_dir)
    with contextlib.suppress(StorageError, OSError):
        clean_scratch(place, older_than=_SURELY_LOCKED_SECONDS)
    folder = place / f"{SCRATCH}{os.urandom(6).hex()}"
    # of this process, as a child that is killed cannot clear up; named before it is made, as a signal may come then
    try:
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise RunDirError(
                f"{place} cannot be written: {error.strerror}", hint="choose another --run-dir"
            ) from error
        with held(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def settled(config: TrainConfig) -> Iterator[tuple[TrainConfig, str, str]]:
    """`config` with its budget in bytes as of now, the budget as it was stated, and why the two differ.

    A refusal inside names the container's limit, where that is in the way. The budget of a GPU stays as it is.
    """
    if config.budget is None or _on_gpu(config):
        yield config, "", ""
        return
    allowance = Allowance(config.budget)
    try:
        yield dataclasses.replace(config, budget=allowance.now()), allowance.text, allowance.why()
    except BudgetInfeasibleError as refusal:
        raise allowance.refused(refusal) from refusal


def _on_gpu(config: TrainConfig) -> bool:
    """Whether the budget is that of a GPU. Without torch, which would tell for certain."""
    return config.device.startswith("cuda") or (config.device == "auto" and Path("/dev/nvidiactl").exists())


def set_up(job: Job, folder: Path, ask: Ask = ask, *, weights: bool = True, told: Told | None = None) -> None:
    """Stage and plan `job` in `folder`; without `weights`, for the plan alone. Raises TrglError.

    Pictures are decoded first, where that was not done before; `told` is given lines about it.

    A BudgetInfeasibleError names a budget that a plan was made for, as far as this machine has the memory to try it.
    """
    job = job.located()
    try:
        _set_up(job, folder, ask, weights=weights, told=told)
    except BudgetInfeasibleError as refusal:
        raise _tried(job, refusal, ask, told) from refusal
    except ProcessDiedError as died:
        if job.config.budget_bytes is None or not _crashed(died):
            raise
        raise _tried(job, too_large(job.config.budget_bytes, 0), ask, told) from died


def check_names(workload: Workload) -> None:
    """Raises UnknownNameError and UsageError for what can be told without a process of its own."""
    check_model_name(workload.model)
    if workload.weights is not None and not Path(workload.weights).is_file():
        raise UsageError(f"weights {workload.weights}: there is no such file", hint="check the path")


def _set_up(job: Job, folder: Path, ask: Ask, *, weights: bool, told: Told | None = None) -> None:
    check_names(job.workload)
    release_code_pages()  # while this process waits for its children it needs next to none
    waiting = process_tree_rss() + _WAITING_CODE_BYTES
    try:
        prepared_bytes = _prepare(job, waiting, ask, told)
        patient = patient_environment(os.environ)
        staged = Took(**ask("stage", StageRequest(job, folder, waiting, weights).to_dict(), environment=patient))
        ours = sorted(name for name in sys.modules if name.split(".")[0] in ("ondevice_trgl", "rich"))
        request = PlanRequest(folder, waiting, ours, set_up_bytes=max(staged.peak_bytes, prepared_bytes))
        ask("plan", request.to_dict(), environment=patient)
    except ProcessDiedError as died:
        said = "".join(getattr(died, "__notes__", ()))
        if job.config.budget_bytes is None or not any(word in said for word in _LACKING):
            raise
        raise too_large(job.config.budget_bytes, 0) from died  # so little memory that it could not even say so


def _prepare(job: Job, waiting: int, ask: Ask, told: Told | None) -> int:
    """Have the pictures of `job` decoded, while this process is small; the peak of both together, 0 without pictures.

    Raises BudgetInfeasibleError where one of them takes more than the budget leaves, DataError.
    """
    workload, config = job.workload, job.config
    if not is_pictures(workload.data):
        return 0
    request = {
        "data": workload.data,
        "task": config.asked_task,
        "fit": vars(fit_for(workload.image_size, workload.orientation)),
        "budget_bytes": None if _on_gpu(config) else config.budget_bytes,
        "caller_bytes": waiting,
        "holder_bytes": _HOLDER_BYTES,
        "tell": told is not None,
    }
    # it tunes malloc itself; another one, preloaded, would take some megabytes
    peak = ask("prepare", request, environment=plain_environment(os.environ), told=told)["peak_bytes"]
    return 0 if _on_gpu(config) else int(peak)


def prepare_for(run_dir: Path, files: Callable[[str], list[Path]] | str, budget: Stated | None, ask: Ask) -> None:
    """Have pictures decoded for a run, by another process within its budget, while this one is small.

    Those of a dataset that is named, split as for training, or `files`: they are asked for, with the run's task, where
    it takes pictures. Nothing is done where it does not: whoever reads the files says so.
    Raises RunDirError, DataError, BudgetInfeasibleError.
    """
    record, report = RunDir.open(run_dir).load(RECORD, RunRecord.from_dict), read_report(run_dir)
    if not record.preprocessing:  # of a run from before there was one
        return
    known = Preprocessing.from_dict(record.preprocessing)
    if known.mean is None or len(known.input_shape) != 3 or known.input_shape[0] not in (1, 3):
        return
    bytes_ = None
    if report.budget_kind == "rss":
        bytes_ = report.budget_bytes if budget is None else Allowance(budget).now()
    waiting = process_tree_rss() + _WAITING_CODE_BYTES
    request = {
        **({"data": files} if isinstance(files, str) else {"files": [str(path) for path in files(known.task)]}),
        "task": known.task,
        "fit": vars(Fit(*known.input_shape, known.orientation)),
        "budget_bytes": bytes_,
        "caller_bytes": waiting,
        "holder_bytes": _HOLDER_BYTES,
    }
    ask("prepare", request, environment=plain_environment(os.environ))


def _crashed(died: ProcessDiedError) -> bool:
    """Whether C code may have been refused its last bytes: it looks at nothing, where Python says so in words."""
    return died.returncode in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)


def _tried(job: Job, refusal: BudgetInfeasibleError, ask: Ask, told: Told | None) -> BudgetInfeasibleError:
    """`refusal` with a budget that was tried: what lacks memory cannot tell how much more it would have taken."""
    needed, room = refusal.smallest_feasible_budget_bytes, usable_ram_bytes()
    percent, last = 1, BaseException()
    for _ in range(_MOST_TRIES):
        if needed > room:
            break
        larger = dataclasses.replace(job, config=dataclasses.replace(job.config, budget=needed))
        try:
            with staging_folder(job.run_dir) as folder:
                _set_up(larger, folder, ask, weights=False, told=told)
            break
        except (BudgetInfeasibleError, ProcessDiedError) as more:
            last = more
            if isinstance(more, ProcessDiedError) and not _crashed(more):
                raise
            named = more.smallest_feasible_budget_bytes if isinstance(more, BudgetInfeasibleError) else needed
            raised = needed + needed * percent // 100
            # 1 %, 2 %, 4 %, ... as long as what is named is hardly more than what was tried
            percent = 1 if named > needed * 21 // 20 else 2 * percent
            needed = -(-max(raised, named) // 1_000_000) * 1_000_000
    else:
        if isinstance(last, ProcessDiedError):
            raise last  # however much memory there is
    if needed == refusal.smallest_feasible_budget_bytes:
        return refusal
    tail = refusal.hint.partition(";")[2]
    return BudgetInfeasibleError(
        refusal.message,
        budget_bytes=refusal.budget_bytes,
        smallest_feasible_budget_bytes=needed,
        hint=f"the smallest feasible budget is {needed // 1_000_000}MB{tail and ';'}{tail}",
    )
