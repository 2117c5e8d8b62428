"""The Report: one frozen record of what was predicted and what was measured. Every renderer reads this alone.

Bytes are integers, times seconds, accuracies and savings fractions from 0 to 1; see `metric` for tasks that have no
accuracy. What was not measured is None.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ondevice_trgl.bounded import parse_object, read_bytes
from ondevice_trgl.errors import DamagedFileError, RunDirError
from ondevice_trgl.tasks import ACCURACY
from ondevice_trgl.typed import record_of, value_of

SCHEMA_VERSION = 1
BASELINES = ("e2e", "e2e_checkpoint")
NOT_YET = "not measured so far"
"""Why a baseline is missing that nobody has decided about."""
_Numbers = tuple[float, ...] | None
_SECONDS = ("stall_seconds?", *(f"waited_for_{why}?" for why in ("nice", "heat", "battery", "load", "app")))
_BYTES = ("gpu_reserved_bytes?", "gpu_allocated_bytes?", "gpu_driver_bytes?")
_SHOWN: Mapping[str, Mapping[str, Any]] = {
    "preprocessing": {"class_names": tuple[str, ...], "input_shape": tuple[int, ...], "resize": str, "task?": str}
    | {"mean": _Numbers, "std": _Numbers},
    "system": {**dict.fromkeys((*_SECONDS, *_BYTES), float | None), "memory_events?": Mapping[str, int]}
    | {"mended?": tuple[str, ...]},
    "workload": {**dict.fromkeys(("weights_left?", "digest?"), str | None), "samples?": Mapping[str, int]},
    "budgets": dict.fromkeys(("budget_bytes", "measured_peak_bytes"), int),
    "timeline": {"seconds": float, "bytes": int, "module": int},
    "pressure": dict.fromkeys(("module", "epoch", "step", "before", "after", "cause"), Any),
    "pareto": {"checkpointed": bool, "cache_dtype": str, "seconds_per_epoch": float | None}
    | dict.fromkeys(("modules", "micro_batch", "predicted_peak_bytes", "cache_bytes"), int),
}
"""What renderers take from the parts that are no records of their own; with a question mark where it is there."""


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """Where boundary activations were kept; `bytes` is the most that stood there at one time."""

    tier: str
    dtype: str
    bytes: int
    dir: str | None


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What the planner chose, with a reason for each choice."""

    num_modules: int
    schedule: str
    laps: int
    batch_size: int
    micro_batch_size: int
    grad_accum_steps: int
    activation_checkpointing: bool
    optimizer: str
    cache: CacheReport
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModuleReport:
    """One local module with its auxiliary head."""

    index: int
    name: str
    params: int
    """Elements, the auxiliary head's included."""
    predicted_peak_bytes: int
    predicted_breakdown: Mapping[str, int] | None = None
    """What they are for: weights, gradients, optimizer, activations, head, others, scratch, floor; they add up."""
    frozen: bool = False
    """None of its own parameters is trained: only its auxiliary head, where it has one."""
    epochs: float | None = None
    """That it was trained, over all laps."""
    best_epoch: int | None = None
    """Of its last lap, from 0: the one whose weights were kept, where every epoch was looked at (`patience`)."""
    passed: bool = False
    """Part of the frozen front: passed through once a lap, without a head, so that it has no accuracies."""
    micro_batch_size: int | None = None
    activation_checkpointing: bool = False
    optimizer_on_disk: bool = False
    measured_peak_bytes: int | None = None
    """Whole process, highest of the laps."""
    train_seconds: float | None = None
    cache_read_bytes: int | None = None
    cache_write_bytes: int | None = None
    cache_dtype: str | None = None
    """Number format in which its boundary was kept, wider than asked for where too much would have been lost."""
    cache_error: float | None = None
    """Share of the boundary's size (root mean square) that was lost by that, in a sample of each batch, at most."""
    train_loss: float | None = None
    """Task loss of the last epoch, mean over samples."""
    transport_cost: float | None = None
    """Transport cost of the last epoch before its weight, mean over samples."""
    multiplier: float | None = None
    """lambda at the end, with tau "multiplier": the transport cost was weighed by 1 / lambda; else None."""
    train_accuracy: float | None = None
    val_accuracy: float | None = None
    test_accuracy: float | None = None
    train_rmse: float | None = None
    """Of a regression, the root of the mean squared error over samples and targets; as the two below."""
    val_rmse: float | None = None
    test_rmse: float | None = None


@dataclass(frozen=True, kw_only=True)
class BaselineReport:
    """End-to-end training of the same work, in a process of its own."""

    status: str
    """measured | did_not_fit | skipped"""
    batch_size: int
    micro_batch_size: int
    measured_peak_bytes: int | None = None
    seconds_per_epoch: float | None = None
    floor_bytes: int | None = None
    timed_steps: int | None = None
    """Optimizer steps that `seconds_per_epoch` was measured on; scaled up where an epoch has more."""
    epochs: int | None = None
    """That it was trained for, at the learning rates of the run; None where a few steps were measured."""
    val_accuracy: float | None = None
    """By the network's own classifier, after those epochs; as `test_accuracy`."""
    test_accuracy: float | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class AccuracyReport:
    """Heads are chosen on validation data alone; `test` is the chosen head's. All are in the report's `metric`."""

    best_head: int | None = None
    """Of all, the network's own classifier included, which counts as the one behind the last module's."""
    best_head_val: float | None = None
    last_head_val: float | None = None
    """Of the whole network, by its own classifier."""
    last_module_val: float | None = None
    """Of the head of the last module, which is of the same kind as those before it, where it has one."""
    ensemble_val: float | None = None
    test: float | None = None
    best_head_val_rmse: float | None = None
    """Of a regression, of the chosen head; as `test_rmse`."""
    test_rmse: float | None = None
    drop: float | None = None
    """The best of the modules' heads, all of one kind, less last_module_val: what depth lost."""
    head: str | None = None
    """Which kind the modules' heads are of; None for a network in one module, which has none but its own."""


@dataclass(frozen=True, kw_only=True)
class SecondsReport:
    """Wall time. `cache` is reading and writing boundaries, forward passes that fill them included."""

    total: float = 0.0
    training: float = 0.0
    cache: float = 0.0
    validation: float = 0.0
    """Behind every epoch, where `patience` looks at it."""
    checkpoint: float = 0.0
    """Writing modules to disk, in mid-training and at their ends."""
    baseline: float = 0.0
    per_epoch: float | None = None
    """One epoch of every module, caching included: the figure to hold against `seconds_per_epoch` of a baseline."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run planned and measured."""

    schema_version: int = SCHEMA_VERSION
    status: str
    """planned | completed | paused | failed"""
    run_dir: str | None
    budget_bytes: int
    budget_kind: str
    """rss (whole process) | cuda (device memory)"""
    meter: str
    floor_bytes: int
    predicted_peak_bytes: int
    measured_peak_bytes: int | None = None
    plan: PlanReport
    modules: tuple[ModuleReport, ...]
    classifier: ModuleReport | None = None
    """The network's own classifier, trained on what the last module puts out; None where that module ends in it."""
    baselines: Mapping[str, BaselineReport] = dataclasses.field(default_factory=dict)
    """by the names in BASELINES"""
    metric: str = ACCURACY
    """What every "accuracy" here is of, larger is better: accuracy, r2, f1 (macro), or pkg.module:callable."""
    accuracy: AccuracyReport = AccuracyReport()
    seconds: SecondsReport = SecondsReport()
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    workload: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What was trained on what: model, data, sample counts, image size."""
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the data were to the network: class_names, input_shape, resize, orientation, pixels, mean, std; what
    `Preprocessing` says of each."""
    message: str = ""
    """Why a run is paused or failed."""
    pressure: tuple[Mapping[str, Any], ...] = ()
    """Every time that memory ran short: lap, module, epoch, step, cause, before, after."""
    pareto: tuple[Mapping[str, Any], ...] = ()
    """Of a plan: the choices that no other beats in predicted bytes, seconds an epoch (an estimate from rehearsed
    steps, None where there are none) and disk bytes; modules, micro_batch, checkpointed, cache_dtype,
    predicted_peak_bytes, seconds_per_epoch, cache_bytes."""
    budgets: tuple[Mapping[str, int], ...] = ()
    """Where the budget was changed while training: budget_bytes and measured_peak_bytes of each stretch."""
    timeline: tuple[Mapping[str, float], ...] = ()
    """From time to time: seconds of the run, bytes that the process held, module that was at work."""
    system: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the system counted in the last sitting: `memory_events` of the process's cgroup, `stall_seconds` that
    something waited for memory by the file `stall_meter`. Of a GPU the highest `gpu_allocated_bytes` (tensors),
    `gpu_reserved_bytes` (what the budget holds) and `gpu_driver_bytes` (CUDA context included, where it counts)."""
    predicted_write_bytes: int | None = None
    """That an undisturbed run writes to disk, but for checkpoints in mid-training."""
    written_bytes: int | None = None
    """That the run wrote to disk, of the same and its checkpoints, in all sittings; None of a plan."""
    flash_endurance_bytes: int | None = None
    """That the device's flash memory stands to be written, where its profile says so."""
    stopped_behind: int | None = None
    """The last module that was trained, where the run ended as deeper ones no longer helped (`stop_when`)."""

    @property
    def held(self) -> bool | None:
        """Whether the budget was kept, each stretch against its own; None where nothing was measured."""
        if self.measured_peak_bytes is None:
            return None
        if len(self.budgets) > 1:
            return all(stretch["measured_peak_bytes"] <= stretch["budget_bytes"] for stretch in self.budgets)
        return self.measured_peak_bytes <= self.budget_bytes

    @property
    def heads(self) -> tuple[ModuleReport, ...]:
        """What runs one behind the other: the modules and, where it is one of its own, the classifier.

        Each has class scores, but those that are `passed`.
        """
        return self.modules if self.classifier is None else (*self.modules, self.classifier)

    @property
    def savings(self) -> dict[str, float | None]:
        """1 - measured peak / measured baseline peak; None where either was not measured, never a guess."""
        return {f"vs_{name}": self._saving(self.baselines.get(name)) for name in ("e2e", "e2e_checkpoint")}

    @property
    def trained_end_to_end(self) -> BaselineReport | None:
        """The baseline that was trained to the end; None where none was."""
        return next((baseline for baseline in self.baselines.values() if baseline.epochs is not None), None)

    @property
    def gains(self) -> dict[str, float | None]:
        """Accuracy on test data less that of end-to-end training: of the head that validation chose, and of the
        network's own classifier, which is the head that end-to-end has; None where either was not measured.
        """
        baseline = self.trained_end_to_end
        own = self.heads[-1].test_accuracy if self.accuracy.best_head is not None else None
        ours = {"best_head": self.accuracy.test, "own_classifier": own}
        theirs = None if baseline is None else baseline.test_accuracy
        return {name: None if value is None or theirs is None else value - theirs for name, value in ours.items()}

    def _saving(self, baseline: BaselineReport | None) -> float | None:
        if baseline is None or baseline.measured_peak_bytes is None or self.measured_peak_bytes is None:
            return None
        return 1.0 - self.measured_peak_bytes / baseline.measured_peak_bytes

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `report.json` and of `train --json`."""
        record = dataclasses.asdict(self)
        record["savings"], record["gains"] = self.savings, self.gains
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Report":
        """The inverse of `to_dict`; unknown keys are left out, so that a newer minor version can be read.

        Raises ValueError for what is none.
        """
        report = record_of(cls, record, lenient=True)
        for name, known in _SHOWN.items():
            values = getattr(report, name)
            for one in values if isinstance(values, tuple) else [values] * bool(values):
                for key, hint in known.items():
                    if (plain := key.removesuffix("?")) in one:
                        value_of(hint, one[plain], f"{name}.{plain}")
                    elif plain == key:
                        raise ValueError(f"{name}.{plain} is missing")
        if (report.preprocessing.get("mean") is None) != (report.preprocessing.get("std") is None):
            raise ValueError("preprocessing has one of mean and std alone")
        peaks = [baseline.measured_peak_bytes for baseline in report.baselines.values()]
        least = (report.budget_bytes, report.plan.laps, *(1 if peak is None else peak for peak in peaks))
        if min(least) < 1 or not report.modules:
            raise ValueError("it is of no budget, laps or modules, or of a baseline that took nothing")
        return report


def read_report(run_dir: Path) -> Report:
    """The report of a run. Raises RunDirError where there is none, DamagedFileError where it cannot be read."""
    path = run_dir / "report.json"
    try:
        text = read_bytes(path)
    except OSError as error:
        raise RunDirError(
            f"{run_dir} holds no report: {error.strerror}", hint="`trgl-device train` or `resume` writes one"
        ) from None
    try:
        record = parse_object(text)
        version = record.get("schema_version")
        if type(version) is int and version > SCHEMA_VERSION:
            raise RunDirError(
                f"{path} was made by a newer version (schema version {version}, this program reads up to"
                f" {SCHEMA_VERSION})",
                hint="upgrade",
            )
        return Report.from_dict(record)
    except ValueError as error:
        raise DamagedFileError(f"{path} is not a report: {error}") from None
