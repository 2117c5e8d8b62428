"""The accuracy of a finished run, measured again from its run directory inside its budget."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ondevice_trgl.config import Workload
from ondevice_trgl.data.registry import DataBundle
from ondevice_trgl.device.limit import NoLimit, limit_for
from ondevice_trgl.device.meter import meter_for
from ondevice_trgl.errors import DataError, StorageError
from ondevice_trgl.model.partition import group
from ondevice_trgl.model.store import ModuleStore, evict
from ondevice_trgl.policy import Stated
from ondevice_trgl.report.model import Report
from ondevice_trgl.run.budget import Budget
from ondevice_trgl.run.evaluation import Evaluation
from ondevice_trgl.run.guards import allowed, device_named, global_state_kept
from ondevice_trgl.run.inputs import check_ids
from ondevice_trgl.run.opening import fresh_head, network_of, sources
from ondevice_trgl.run.record import RunRecord
from ondevice_trgl.run.run_dir import RECORD, SCRATCH, RunDir
from ondevice_trgl.run.trained import TrainedRun
from ondevice_trgl.workload import build_for, load_bundle

ENSEMBLE = "ensemble"


def evaluate(
    run_dir: Path,
    peak_before: int,
    *,
    head: str = "best",
    data: str | None = None,
    data_root: Path | str | None = None,
    budget: Stated | None = None,
) -> dict[str, Any]:
    """See `jobs.evaluate_run`. `peak_before` is what this process took so far, where it is ours."""
    trained = TrainedRun.open(run_dir)
    plan, report = trained.plan, trained.report
    index = plan.num_modules - 1 if head == ENSEMBLE else trained.head(head)
    record = trained.run.load(RECORD, RunRecord.from_dict)
    config, named = record.config, record.named(run_dir)
    workload = dataclasses.replace(
        named,
        data=named.data if data is None else data,
        data_root=named.data_root if data_root is None else data_root,
    )
    # what was measured on this kind of device there is to be measured here; a run may have moved to a lesser machine
    on_gpu = report.budget_kind == "cuda" and torch.cuda.is_available()
    device, seed = device_named(config.device if on_gpu else "cpu"), config.seed
    budget_bytes = allowed(report.budget_bytes if budget is None else budget, device)()
    with (
        global_state_kept(config.threads),
        meter_for(device) as meter,
        _scratch(trained.run, config.cache_dir) as scratch,
    ):
        bundle = load_bundle(workload, seed, scratch)
        _check_kind(workload, bundle, report)
        test = sources(None, None, bundle.test)["test"]
        chain = network_of(trained.run, lambda: build_for(workload, bundle, seed), test, scratch)
        check_ids(chain, {"test": test})
        partition = group(chain, plan.bounds)
        heads = [fresh_head(chain, partition, config, k) for k in range(plan.num_modules)]
        evict(*partition.modules, *heads)
        store = ModuleStore(trained.run.modules)
        is_meant = budget is not None or meter.kind == report.budget_kind
        held = Budget(budget_bytes, limit_for(device) if is_meant and config.enforce else NoLimit(), meter)
        measured = Evaluation(partition, heads, plan, store, test, scratch, device, held).run(
            index, ensemble=head == ENSEMBLE
        )
        peak = max(meter.peak_bytes(), peak_before if meter.kind == "rss" else 0)
    accuracy = measured.heads[index] if measured.ensemble is None else measured.ensemble
    # of the ensemble a report has no figure on test data
    comparable = measured.ensemble is None and bundle.digest == report.workload.get("digest")
    return {
        "accuracy": accuracy,
        "samples": len(bundle.test),
        "head": index if measured.ensemble is None else head,
        "heads": list(measured.heads),
        "data": workload.data,
        "matches_report": accuracy == report.modules[index].test_accuracy if comparable else None,
        "budget_bytes": budget_bytes if is_meant else None,
        "measured_peak_bytes": peak,
    }


def _check_kind(workload: Workload, bundle: DataBundle, report: Report) -> None:
    """Raises DataError where the data are of another shape or number of classes than the run's own."""
    for what, found in (("input_shape", list(bundle.input_shape)), ("num_classes", bundle.num_classes)):
        if found != report.workload[what]:
            raise DataError(
                f"{workload.data} has {what.replace('_', ' ')} {found}, "
                f"the run was trained with {report.workload[what]}",
                hint="evaluate on data of the same shape and classes",
            )


@contextlib.contextmanager
def _scratch(run: RunDir, cache_dir: str | Path | None) -> Iterator[Path]:
    """A folder for the time of the context, in `cache_dir` if that is there, else in the run. Raises StorageError.

    Not that of the run's own cache: two may evaluate one run at a time.
    """
    place = Path(cache_dir) if cache_dir is not None and Path(cache_dir).is_dir() else run.path
    try:
        folder = tempfile.TemporaryDirectory(prefix=SCRATCH, dir=place)
    except OSError as error:
        raise StorageError(
            f"{place} cannot be written: {error.strerror}", hint="copy the run to a folder that can"
        ) from error
    with folder as path:
        yield Path(path)
