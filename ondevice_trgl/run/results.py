"""What a run leaves behind: the report of its measurements, and the trained network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.data.preprocessing import Preprocessing
from ondevice_trgl.device.meter import PeakMeter
from ondevice_trgl.model.heads import head_behind
from ondevice_trgl.model.partition import Partition
from ondevice_trgl.model.store import ModuleStore
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.report.model import (
    BASELINES,
    NOT_YET,
    AccuracyReport,
    BaselineReport,
    CacheReport,
    ModuleReport,
    PlanReport,
    Report,
    SecondsReport,
)
from ondevice_trgl.run.measured import Measured
from ondevice_trgl.trgl.task import Task

CPU = torch.device("cpu")


def _plan_report(plan: Plan, config: TrainConfig, cache_dir: Path | None) -> PlanReport:
    """The plan as the report shows it."""
    on_disk = plan.cache_tier == "disk"
    return PlanReport(
        num_modules=plan.num_modules,
        schedule=config.schedule,
        laps=config.laps,
        batch_size=plan.batch_size,
        micro_batch_size=plan.micro_batch_size,
        grad_accum_steps=plan.grad_accum_steps,
        activation_checkpointing=plan.checkpointed,
        optimizer=config.optimizer,
        cache=CacheReport(
            tier=plan.cache_tier,
            dtype=plan.cache_dtype,
            bytes=plan.cache_bytes,
            dir=str(cache_dir) if on_disk and cache_dir else None,
        ),
        reasons=plan.reasons,
    )


def make_report(
    *,
    run_dir: Path | None,
    config: TrainConfig,
    plan: Plan,
    names: Sequence[str],
    measured: Sequence[Measured],
    accuracy: AccuracyReport | None = None,
    meter: PeakMeter,
    peak_outside: int = 0,
    status: str,
    message: str = "",
    total_seconds: float = 0.0,
    checkpoint_seconds: float = 0.0,
    environment: Mapping[str, Any],
    workload: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    pressure: Sequence[Mapping[str, Any]] = (),
    budgets: Sequence[Mapping[str, int]] = (),
    system: Mapping[str, Any] | None = None,
    stopped_behind: int | None = None,
    written_bytes: int | None = None,
    flash_endurance_bytes: int | None = None,
    timeline: Sequence[Mapping[str, float]] = (),
) -> Report:
    """The report of a run or, with status "planned" and empty measurements, of a plan.

    `peak_outside` is the highest that was measured outside of the modules' own times; 0 where nothing was.
    """
    peaks = [peak for peak in (peak_outside, *(m.measured_peak_bytes for m in measured)) if peak]
    cache_dir = Path(config.cache_dir) if config.cache_dir else run_dir / "cache" if run_dir else None
    mean = config.mean_epochs(plan.num_trained)
    epochs = [_epochs(m, mean * config.laps) for m in measured]
    if plan.classifier:  # its epochs in one of the modules' are part of what that takes
        epochs[-1] *= mean / config.own_epochs if not measured[-1].frozen else 1.0
    trained = slice(None if stopped_behind is None else stopped_behind + 1)
    timed = list(zip(measured, epochs, strict=True))[trained]
    rows = tuple(_module_report(i, names[i], plan, m) for i, m in enumerate(measured))
    return Report(
        status=status,
        message=message,
        run_dir=str(run_dir) if run_dir else None,
        budget_bytes=plan.budget_bytes,
        budget_kind=meter.kind,
        meter=meter.name,
        floor_bytes=plan.floor_bytes,
        predicted_peak_bytes=plan.peak_bytes,
        measured_peak_bytes=max(peaks) if peaks else None,
        plan=_plan_report(plan, config, cache_dir),
        modules=rows[: plan.num_modules],
        classifier=rows[-1] if plan.classifier else None,
        baselines={
            name: BaselineReport(
                status="skipped", batch_size=plan.batch_size, micro_batch_size=plan.batch_size, reason=NOT_YET
            )
            for name in BASELINES
        },
        metric=config.metric_name(Preprocessing.kind_in(preprocessing)),
        accuracy=accuracy or AccuracyReport(),
        seconds=SecondsReport(
            total=total_seconds,
            training=sum(m.train_seconds for m in measured),
            cache=sum(m.cache_seconds for m in measured),
            validation=sum(m.validation_seconds for m in measured),
            checkpoint=checkpoint_seconds,
            per_epoch=sum((m.train_seconds + m.cache_seconds) / done for m, done in timed)
            if timed and all(done for _, done in timed)
            else None,
        ),
        environment=environment,
        workload=workload,
        preprocessing=preprocessing,
        pressure=tuple(pressure),
        pareto=tuple(vars(choice) for choice in plan.pareto),
        budgets=tuple(budgets),
        system=system or {},
        stopped_behind=stopped_behind,
        predicted_write_bytes=plan.write_bytes,
        written_bytes=written_bytes,
        timeline=tuple(timeline),
        flash_endurance_bytes=flash_endurance_bytes,
    )


def _epochs(measured: Measured, usual: int) -> float:
    """Behind the module; a frozen one without a head has none, and its sweep, one a lap, is spread over all."""
    passed_over = measured.frozen and measured.is_done and not measured.epochs_done
    return float(usual) if passed_over else measured.epochs_done


def _module_report(index: int, name: str, plan: Plan, measured: Measured) -> ModuleReport:
    started = measured.epochs_done > 0 or (measured.frozen and measured.is_done)
    return ModuleReport(
        index=index,
        name=name,
        params=measured.params,
        frozen=measured.frozen,
        epochs=measured.epochs_done or None,
        best_epoch=measured.best_epoch,
        passed=measured.passed,
        predicted_peak_bytes=plan.predicted_peak_bytes[index],
        predicted_breakdown=vars(plan.predicted_breakdowns[index]) if plan.breakdowns else None,
        micro_batch_size=plan.rungs[index].micro_batch_size,
        activation_checkpointing=plan.rungs[index].checkpointed,
        optimizer_on_disk=plan.rungs[index].spilled,
        measured_peak_bytes=measured.measured_peak_bytes or None,
        train_seconds=measured.train_seconds if started else None,
        cache_read_bytes=measured.cache_read_bytes if started else None,
        cache_write_bytes=measured.cache_write_bytes if started else None,
        cache_dtype=measured.cache_dtype,
        cache_error=measured.cache_error,
        train_loss=measured.train_loss,
        transport_cost=measured.transport_cost,
        multiplier=measured.multiplier,
        train_accuracy=measured.train_accuracy,
        val_accuracy=measured.val_accuracy,
        test_accuracy=measured.test_accuracy,
        train_rmse=measured.train_rmse,
        val_rmse=measured.val_rmse,
        test_rmse=measured.test_rmse,
    )


def accuracies(
    store: ModuleStore, plan: Plan, kind: str, measured: Sequence[Measured], val_labels: Tensor | None, task: Task
) -> AccuracyReport:
    """Heads compared on validation data; of equals the deepest is best. Without validation data the last is taken.

    `kind` is that of the auxiliary heads. A network of several modules without a classifier of its own has a last head
    of another kind than the others. The frozen front has no heads; of a completed run, what has no accuracy was not
    trained, as it no longer helped.
    """
    judged = {index: m for index, m in enumerate(measured) if m.train_accuracy is not None}
    if not judged:
        return AccuracyReport()
    head = kind if len(judged) > 1 else None
    scores = {index: m.val_accuracy for index, m in judged.items() if m.val_accuracy is not None}
    if val_labels is None or len(scores) < len(judged):
        last = measured[-1]
        return AccuracyReport(best_head=len(measured) - 1, test=last.test_accuracy, test_rmse=last.test_rmse, head=head)
    best = max(scores, key=lambda index: (scores[index], index))
    total = torch.zeros(())
    for index in scores:
        total = total + store.load_extra(index, "run", CPU)["probabilities"]
    ensemble = task.judged(total / len(scores), val_labels)
    own = [score for index, score in scores.items() if index < plan.num_modules]
    return AccuracyReport(
        best_head=best,
        best_head_val=scores[best],
        last_head_val=scores.get(len(measured) - 1),
        last_module_val=own[-1] if own else None,
        ensemble_val=ensemble,
        test=measured[best].test_accuracy,
        best_head_val_rmse=measured[best].val_rmse,
        test_rmse=measured[best].test_rmse,
        drop=max(own) - own[-1] if own else None,
        head=head,
    )


def load_network(store: ModuleStore, partition: Partition, config: TrainConfig, index: int) -> nn.Module:
    """The trained network up to head `index`, in eval mode; for the last, the model itself with its own classifier.

    Memory: the weights up to there.
    """
    last = index == len(partition.modules) - 1
    head = None
    if not last:
        head = head_behind(partition.modules[index], config.head, partition.chain.num_outputs)
    for k in range(index + 1):
        store.load(k, partition.modules[k], head if k == index else None, CPU)
    if last:
        return partition.chain.model.eval()
    assert head is not None
    return nn.Sequential(*partition.modules[: index + 1], head).eval()
