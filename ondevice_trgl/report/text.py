"""A Report as tables and sentences; the HTML page takes the same ones, so that both show the same figures."""

from ondevice_trgl.report.accuracy import accuracy_line as accuracy_line
from ondevice_trgl.report.accuracy import gain_line as gain_line
from ondevice_trgl.report.ended import ended, stopped_line
from ondevice_trgl.report.memory import memory_notes
from ondevice_trgl.report.model import BaselineReport, ModuleReport, Report
from ondevice_trgl.report.table import (
    Cell,
    Line,
    Span,
    Table,
    format_count,
    format_fraction,
    format_seconds,
    labelled,
    make_table,
    table_lines,
    wrapped,
)
from ondevice_trgl.report.wear import disk_line as disk_line
from ondevice_trgl.tasks import CLASSES, MULTI_LABEL, format_metric, metric_title
from ondevice_trgl.units import format_size

_MOST_NAMES = 12
STRATEGIES = {"e2e": "end-to-end", "e2e_checkpoint": "checkpointed end-to-end"}


def _size(size: int | None) -> str | None:
    return None if size is None else format_size(size)


def against_budget(peak: int | None, budget: int) -> Span | None:
    """How far a peak is under or over the budget."""
    if peak is None:
        return None
    if peak <= budget:
        return Span(f"under by {format_size(budget - peak)}", "good")
    return Span(f"over by {format_size(peak - budget)}", "bad")


def module_table(report: Report) -> Table:
    """One row a local module."""
    return make_table(
        "Modules",
        ("#", "<module", "params", "predicted", "measured", "time", "train", "val", "transport"),
        [_module_row(module, report, own=module is report.classifier) for module in report.heads],
    )


def _module_row(module: ModuleReport, report: Report, *, own: bool) -> list[Cell]:
    measured, cost, budget = module.measured_peak_bytes, module.transport_cost, report.budget_bytes
    over = measured is not None and measured > budget
    return [
        str(module.index),
        module.name + " (own classifier)" * own + " (frozen)" * module.frozen + ended(module, report),
        format_count(module.params),
        Span(format_size(module.predicted_peak_bytes), "bad" if module.predicted_peak_bytes > budget else ""),
        None if measured is None else Span(format_size(measured), "bad" if over else ""),
        format_seconds(module.train_seconds),
        format_metric(module.train_accuracy, report.metric),
        format_metric(module.val_accuracy, report.metric),
        None if cost is None else f"{cost:.3g}",
    ]


def breakdown_table(report: Report) -> Table:
    """What the predicted bytes of each module are for, one row a module."""
    known = [(module, module.predicted_breakdown) for module in report.heads if module.predicted_breakdown]
    purposes = list(known[0][1]) if known else []
    rows: list[list[Cell]] = [
        [str(module.index), *(format_size(bytes_) for bytes_ in breakdown.values())] for module, breakdown in known
    ]
    return make_table("Predicted bytes", ("#", *purposes), rows)


def pareto_table(report: Report) -> Table:
    """What else could be chosen, one row a choice; seconds are estimates from rehearsed steps."""
    rows: list[list[Cell]] = [
        [
            str(choice["modules"]),
            str(choice["micro_batch"]),
            "yes" if choice["checkpointed"] else "no",
            choice["cache_dtype"],
            Span(
                format_size(choice["predicted_peak_bytes"]),
                "bad" if choice["predicted_peak_bytes"] > report.budget_bytes else "",
            ),
            format_seconds(choice["seconds_per_epoch"]),
            format_size(choice["cache_bytes"]),
        ]
        for choice in report.pareto
    ]
    names = ("modules", "micro-batch", "checkpointed", "<cache", "predicted", "an epoch, estimated", "disk")
    return make_table("Choices that no other beats", names, rows)


def comparison_table(report: Report) -> Table:
    """End-to-end, checkpointed end-to-end and TRGL side by side; only what was measured has figures.

    Accuracy, on test data, where a baseline was trained to the end; of TRGL that of the head that validation chose.
    """
    rows: list[list[Cell]] = []
    for name, label in STRATEGIES.items():
        if (baseline := report.baselines.get(name)) is not None:
            rows.append(_baseline_row(label, baseline, report, report.savings[f"vs_{name}"]))
    own = report.measured_peak_bytes
    rows.append(
        [
            Span("TRGL", "title"),
            f"{report.plan.batch_size} ({report.plan.micro_batch_size})",
            _size(own) or Span("not measured", "dim"),
            against_budget(own, report.budget_bytes),
            format_seconds(report.seconds.per_epoch),
            None,
            format_metric(report.accuracy.test, report.metric),
        ]
    )
    names = ["<training", "batch", "measured", "<budget", "an epoch", "saving", metric_title(report.metric)]
    if report.trained_end_to_end is None:
        names, rows = names[:-1], [row[:-1] for row in rows]
    return make_table("Peak memory", tuple(names), rows)


def _baseline_row(label: str, baseline: BaselineReport, report: Report, saving: float | None) -> list[Cell]:
    peak = baseline.measured_peak_bytes
    absent = {"did_not_fit": Span("did not fit", "bad"), "skipped": Span("skipped", "dim")}
    return [
        label,
        f"{baseline.batch_size} ({baseline.micro_batch_size})",
        _size(peak) or absent.get(baseline.status, Span("not measured", "dim")),
        against_budget(peak, report.budget_bytes),
        format_seconds(baseline.seconds_per_epoch),
        format_fraction(saving),
        format_metric(baseline.test_accuracy, report.metric),
    ]


def baseline_notes(report: Report) -> list[str]:
    """Why a baseline has no figures, one sentence each."""
    words = {"did_not_fit": "did not fit", "skipped": "was skipped"}
    return [
        f"{label[0].upper()}{label[1:]} {words[baseline.status]}{f': {baseline.reason}' if baseline.reason else ''}"
        for name, label in STRATEGIES.items()
        if (baseline := report.baselines.get(name)) is not None and baseline.status in words
    ]


def verdict(report: Report) -> Span:
    """The run in one sentence."""
    budget, predicted, peak = report.budget_bytes, report.predicted_peak_bytes, report.measured_peak_bytes
    if report.status == "planned":
        held, text = predicted <= budget, f"predicted peak {format_size(predicted)} of {format_size(budget)}"
        return Span(f"{'Fits' if held else 'Does not fit'} the budget: {text}.", "good" if held else "bad")
    measured = f"measured peak {format_size(peak)} of {format_size(budget)}" if peak else "no peak was measured"
    if report.status in ("paused", "failed"):
        why = f" ({report.message})" if report.message else ""
        tone = "bad" if report.status == "failed" else ""
        return Span(f"{report.status.capitalize()}{why}: {measured}.", tone)
    if peak is None:
        return Span(f"Completed, but {measured}.", "bad")
    held = bool(report.held)
    if len(report.budgets) > 1:
        measured = "measured peak " + ", then ".join(
            f"{format_size(one['measured_peak_bytes'])} of {format_size(one['budget_bytes'])}" for one in report.budgets
        )
    sentence = f"{'Held' if held else 'Went over'} the budget: {measured}{_savings(report)}."
    return Span(sentence, "good" if held else "bad")


def _savings(report: Report) -> str:
    parts = []
    for name, label in STRATEGIES.items():
        saving, baseline = report.savings[f"vs_{name}"], report.baselines.get(name)
        if saving is not None:
            parts.append(f"{abs(100 * saving):.0f}% {'less' if saving >= 0 else 'more'} than {label}")
        elif baseline is not None and baseline.status == "did_not_fit":
            parts.append(f"{label} did not fit")
    return "; " + ", ".join(parts) if parts else ""


def subject(report: Report) -> str:
    """What was trained on what."""
    work = report.workload
    return f"{work.get('model', 'model')} on {work.get('data', 'data')}"


def budget_line(report: Report) -> str:
    """The budget as it was understood, the meter and the floor."""
    kind = {"rss": "for the whole process", "cuda": "of device memory"}.get(report.budget_kind, report.budget_kind)
    return (
        f"{format_size(report.budget_bytes)} ({report.budget_bytes:,} bytes) {kind}, "
        f"floor {format_size(report.floor_bytes)}, meter {report.meter}"
    )


def plan_line(report: Report) -> str:
    """What the planner chose."""
    plan = report.plan
    laps = f", {plan.laps} laps" if plan.laps > 1 else ""
    plural = "module" if plan.num_modules == 1 else "modules"
    passed = sum(module.passed for module in report.modules)
    plural += f" ({passed} frozen in front)" if passed else ""
    cache = "no cache"
    if plan.cache.bytes:
        cache = f"cache {plan.cache.tier} {plan.cache.dtype}, {format_size(plan.cache.bytes)}"
    return (
        f"{plan.num_modules} {plural}, {plan.schedule}{laps}; batch {plan.batch_size} = micro-batch "
        f"{plan.micro_batch_size} x {plan.grad_accum_steps}; {plan.optimizer}; "
        f"checkpointing {'on' if plan.activation_checkpointing else 'off'}; {cache}"
    )


def input_lines(report: Report) -> list[tuple[str, str]]:
    """What the data were to the network, as (name, text); none where that is not known."""
    known = report.preprocessing
    if not known:
        return []
    names, size = known["class_names"], "x".join(map(str, known["input_shape"]))
    first = ", ".join(names[:_MOST_NAMES])
    known_as = (
        "classes" if known.get("task", CLASSES) == CLASSES else "labels" if known["task"] == MULTI_LABEL else "targets"
    )
    classes = f"{len(names)}: {first}" + (f", and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")
    how = {"center-crop": ", cropped in the middle and scaled", "bilinear": ", scaled"}.get(known["resize"], "")
    if known["mean"] is not None:
        mean, std = (", ".join(f"{value:.1f}" for value in known[name]) for name in ("mean", "std"))
        how += f"; pixels 0 to 255 less {mean}, divided by {std} (mean and spread of the training set)"
    left = report.workload.get("weights_left")
    return [("input", f"{size}{how}"), (known_as, classes), *([("weights", left)] if left else [])]


def seconds_line(report: Report) -> str | None:
    """Where the time went, or None before anything ran."""
    seconds = report.seconds
    if not seconds.total:
        return None
    parts = [
        ("training", seconds.training),
        ("cache", seconds.cache),
        ("validation", seconds.validation),
        ("checkpoints", seconds.checkpoint),
        ("baselines", seconds.baseline),
        ("rested as asked", report.system.get("waited_for_nice")),
        ("too hot", report.system.get("waited_for_heat")),
        ("battery low", report.system.get("waited_for_battery")),
        ("others computing", report.system.get("waited_for_load")),
        ("the app asked", report.system.get("waited_for_app")),
    ]
    shares = ", ".join(f"{name} {format_seconds(value)}" for name, value in parts if value)
    return f"{format_seconds(seconds.total)}{f' ({shares})' if shares else ''}"


def report_lines(report: Report, width: int = 100) -> list[Line]:
    """The whole report for a terminal of `width` columns."""
    lines: list[Line] = [(Span(subject(report), "title"),)]
    for name, text in (("budget", budget_line(report)), ("plan", plan_line(report)), *input_lines(report)):
        lines += labelled(name, text, width)
    if report.status == "planned":
        for number, reason in enumerate(report.plan.reasons):
            lines += labelled("why" if number == 0 else "", f"- {reason}", width, hang=2)
    lines += [(), *table_lines(module_table(report), width)]
    if report.baselines or report.measured_peak_bytes is not None:
        lines += [(), *table_lines(comparison_table(report), width)]
        for note in baseline_notes(report):
            lines += wrapped(Span(note, "dim"), width)
    lines += [(), *wrapped(verdict(report), width)]
    for name, known in (
        (metric_title(report.metric), accuracy_line(report)),
        ("", gain_line(report)),
        ("stopped", stopped_line(report)),
        ("time", seconds_line(report)),
        ("disk", disk_line(report)),
    ):
        lines += labelled(name, known, width) if known else []
    for number, note in enumerate(memory_notes(report)):
        lines += labelled("memory" if number == 0 else "", f"- {note}", width, hang=2)
    return lines
