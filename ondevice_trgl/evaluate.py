"""A run put to use inside its budget: its accuracy measured again, or pictures told apart."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.data.holdout import Holdout, as_trained
from ondevice_trgl.data.images import ImageSet
from ondevice_trgl.data.pictures import same_data
from ondevice_trgl.data.preprocessing import Preprocessing
from ondevice_trgl.data.registry import load_holdout, load_pictures
from ondevice_trgl.device.limit import NoLimit, limit_for
from ondevice_trgl.device.meter import PeakMeter, meter_for
from ondevice_trgl.errors import StorageError
from ondevice_trgl.model.names import needs_channels
from ondevice_trgl.model.partition import Partition, group
from ondevice_trgl.model.store import ModuleStore, evict
from ondevice_trgl.policy import Stated
from ondevice_trgl.run.batches import Source
from ondevice_trgl.run.budget import Budget
from ondevice_trgl.run.evaluation import Evaluation
from ondevice_trgl.run.guards import allowed, device_named, global_state_kept
from ondevice_trgl.run.inputs import check_ids
from ondevice_trgl.run.lock import held
from ondevice_trgl.run.opening import fresh_head, network_of, sources
from ondevice_trgl.run.record import RunRecord
from ondevice_trgl.run.run_dir import RECORD, SCRATCH, RunDir
from ondevice_trgl.run.trained import TrainedRun
from ondevice_trgl.tasks import CLASSES, REGRESSION
from ondevice_trgl.trgl.task import Task
from ondevice_trgl.workload import build_for, load_bundle

ENSEMBLE = "ensemble"
_CHANGED = (
    "these are not the data of the training any more: what is taken for the test part may hold samples that were"
    " trained on"
)
_GROUP_BYTES = 8_000_000
"""Pictures are told apart in groups whose predictions take about this much."""
_THERE = 0.5
"""A label is there whose probability is above this."""


def evaluate(
    run_dir: Path,
    peak_before: int,
    *,
    head: str = "best",
    data: str | None = None,
    data_root: Path | str | None = None,
    budget: Stated | None = None,
    by_order: bool = False,
) -> dict[str, Any]:
    """See `jobs.evaluate_run`. `peak_before` is what this process took so far, where it is ours."""
    with _opened(run_dir, head, budget, peak_before) as network:
        held, digest = _test_data(network, data, data_root, by_order)
        task = network.task(judging=True)
        measured = network.evaluation(held.samples, task).run(network.index, ensemble=network.ensemble)
        peak = network.peak_bytes()
    index, report = network.index, network.trained.report
    accuracy = measured.heads[index] if measured.ensemble is None else measured.ensemble
    # of the ensemble a report has no figure on test data
    reported = report.heads[index].test_accuracy  # None of a run whose report is from before that
    comparable = measured.ensemble is None and digest is not None and digest == report.workload.get("digest")
    return {
        "accuracy": accuracy,
        "metric": task.metric,
        "rmse": measured.rmse[index] if measured.ensemble is None else None,
        "samples": len(held.samples),
        "head": index if measured.ensemble is None else head,
        "heads": list(measured.heads),
        "data": data or network.workload.data,
        "told": list(held.told),
        "matches_report": accuracy == reported if comparable and reported is not None else None,
        "budget_bytes": network.budget_bytes,
        "measured_peak_bytes": peak,
    }


def predict(
    run_dir: Path,
    peak_before: int,
    paths: Sequence[Path],
    *,
    head: str = "best",
    top: int = 1,
    budget: Stated | None = None,
) -> dict[str, Any]:
    """See `jobs.predict_run`."""
    with _opened(run_dir, head, budget, peak_before) as network:
        found = load_pictures(paths, network.known, scratch_dir=network.scratch)
        names, task = network.known.class_names, network.task(judging=False)
        predictions: list[dict[str, Any]] = []
        rows = max(1, _GROUP_BYTES // (4 * len(names)))
        for start in range(0, len(found.files), rows):
            group_of = _Some(found.samples, start, min(rows, len(found.files) - start), task)
            given = network.evaluation(group_of, task).predictions(network.index, ensemble=network.ensemble)
            said = _classes(given, names, top) if task.kind == CLASSES else _targets(given, names, task.kind)
            predictions += [{"file": str(file), **one} for file, one in zip(found.files[start:], said, strict=False)]
        peak = network.peak_bytes()
    return {
        "predictions": predictions,
        "task": task.kind,
        "head": head if network.ensemble else network.index,
        "told": [found.told] if found.told else [],
        "budget_bytes": network.budget_bytes,
        "measured_peak_bytes": peak,
    }


def _classes(given: Tensor, names: Sequence[str], top: int) -> Iterator[dict[str, Any]]:
    """The best `top` classes of each row of probabilities."""
    shares, labels = given.topk(min(top, len(names)), dim=1)
    for share, label in zip(shares.tolist(), labels.tolist(), strict=True):
        best = [{"class": names[k], "label": k, "confidence": p} for k, p in zip(label, share, strict=True)]
        yield {**best[0], "top": best}


def _targets(given: Tensor, names: Sequence[str], kind: str) -> Iterator[dict[str, Any]]:
    """The numbers of each row by the names of the targets; of labels those that are there too, the likeliest first."""
    for row in given.tolist():
        if kind == REGRESSION:
            yield {"values": dict(zip(names, row, strict=True))}
        else:
            likely = sorted(zip(names, row, strict=True), key=lambda pair: -pair[1])
            yield {"labels": [name for name, share in likely if share > _THERE], "confidences": dict(likely)}


class _Some(ImageSet):
    """`count` samples of `given` from `start` on, whose labels are not known."""

    def __init__(self, given: ImageSet, start: int, count: int, task: Task) -> None:
        super().__init__(task.no_labels(count), given.shape)
        self._given, self._start = given, start

    def _fill(self, indices: list[int], out: Tensor) -> Tensor:
        self._given.read([self._start + index for index in indices], out)
        return self.labels[indices]


def _test_data(
    network: "_Network", data: str | None, data_root: Path | str | None, by_order: bool
) -> tuple[Holdout, str | None]:
    """What to measure on; of the run's own data the test set, with their digest."""
    own = network.workload
    root = own.data_root if data_root is None else data_root
    if data is None or same_data(data, own.data):
        own, known = dataclasses.replace(own, data_root=root), network.known
        bundle = load_bundle(own, network.seed, network.scratch, known, known.task)
        origin = f"the test part of {own.data}"
        held = as_trained(bundle.test, bundle.class_names, origin, network.known, what=own.data, by_order=by_order)
        if network.trained.report.workload.get("digest") not in (None, bundle.digest):
            held = dataclasses.replace(held, told=(*held.told, _CHANGED))
        return held, bundle.digest
    held = load_holdout(
        data,
        network.known,
        root=None if root is None else Path(root),
        channels=needs_channels(own.model),
        image_size=own.image_size,
        seed=network.seed,
        scratch_dir=network.scratch,
        by_order=by_order,
    )
    return held, None


@dataclass
class _Network:
    """A trained network, on disk until a module is needed."""

    trained: TrainedRun
    workload: Workload
    known: Preprocessing
    index: int
    """The module whose head is meant, the last one for the ensemble."""
    ensemble: bool
    seed: int
    device: torch.device
    scratch: Path
    held: Budget
    meter: PeakMeter
    budget_bytes: int | None
    """None where what is measured here is another kind of memory than the run's."""
    peak_before: int
    fresh: Callable[[Source], tuple[Partition, list[nn.Module | None]]]
    precision: str
    """That of the run, as far as this machine has it."""
    config: TrainConfig

    def task(self, *, judging: bool) -> Task:
        """What the run learned; not `judging`, without a metric of the user's. Raises UsageError."""
        kind, outputs = self.known.task, self.known.num_classes
        return Task.of(self.config, kind, outputs) if judging else Task(kind, outputs)

    def evaluation(self, samples: ImageSet, task: Task) -> Evaluation:
        """Of `samples`, ready to be run."""
        source = sources(None, None, samples)["test"]
        partition, heads = self.fresh(source)
        store = ModuleStore(self.trained.run.modules)
        plan, scratch = self.trained.plan, self.scratch
        return Evaluation(
            partition, heads, plan, store, source, scratch, self.device, self.held, precision=self.precision, task=task
        )

    def peak_bytes(self) -> int:
        """The highest so far, of the kind that the meter measures."""
        return max(self.meter.peak_bytes(), self.peak_before if self.meter.kind == "rss" else 0)


@contextlib.contextmanager
def _opened(run_dir: Path, head: str, budget: Stated | None, peak_before: int) -> Iterator[_Network]:
    """The network of a run, as far as it is finished. Raises RunDirError, UsageError, StorageError."""
    trained = TrainedRun.open(run_dir)
    plan, report = trained.plan, trained.report
    index = trained.last if head == ENSEMBLE else trained.head(head)
    record = trained.run.load(RECORD, RunRecord.from_dict)
    config, workload = record.config, record.named(run_dir)
    # what was measured on this kind of device there is to be measured here; a run may have moved to a lesser machine
    on_gpu = report.budget_kind == "cuda" and torch.cuda.is_available()
    device = device_named(config.device if on_gpu else "cpu")
    budget_bytes = allowed(report.budget_bytes if budget is None else budget, device)()
    with (
        global_state_kept(config.threads),
        meter_for(device) as meter,
        _scratch(trained.run, config.cache_dir) as scratch,
    ):
        if record.preprocessing:
            known = Preprocessing.from_dict(record.preprocessing)
        else:  # of a run from before it was remembered
            known = load_bundle(workload, config.seed, scratch).preprocessing

        def fresh(source: Source) -> tuple[Partition, list[nn.Module | None]]:
            chain = network_of(trained.run, lambda: build_for(workload, known, config.seed), source, scratch, config)
            check_ids(chain, {"test": source})
            partition = group(chain, plan.bounds)
            heads = [fresh_head(chain, partition, config, k) for k in range(plan.num_parts)]
            evict(*partition.modules, *heads)
            return partition, heads

        is_meant = budget is not None or meter.kind == report.budget_kind
        held = Budget(budget_bytes, limit_for(device) if is_meant and config.enforce else NoLimit(), meter)
        try:
            yield _Network(
                trained, workload, known, index, head == ENSEMBLE, config.seed, device, scratch, held, meter,
                budget_bytes if is_meant else None, peak_before, fresh,
                "fp32" if config.precision == "fp32" else "auto", config,
            )  # fmt: skip
        finally:
            held.end()


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
    with folder as path, held(Path(path)), held(run.path / RECORD, shared=True):
        yield Path(path)
