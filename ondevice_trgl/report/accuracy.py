"""How good the heads are, in words and in the metric of the task."""

from ondevice_trgl.report.model import Report
from ondevice_trgl.tasks import format_gain, format_metric


def gain_line(report: Report) -> str | None:
    """Accuracy against end-to-end training; None where nothing was judged."""
    baseline, gains, metric = report.trained_end_to_end, report.gains, report.metric
    if report.accuracy.test is None:
        return None
    if baseline is None or gains["best_head"] is None:
        return "against end-to-end not measured; --baseline full trains that to the end too"
    own = f", the network's own classifier, which end-to-end has too, {format_gain(gains['own_classifier'], metric)}"
    return (
        f"test {format_metric(baseline.test_accuracy, metric)} end-to-end, after as many epochs ({baseline.epochs});"
        f" the best head is {format_gain(gains['best_head'], metric)}{'' if gains['own_classifier'] is None else own}"
    )


def accuracy_line(report: Report) -> str | None:
    """The accuracies that are known, in the report's metric, or None."""
    known = report.accuracy
    head = "" if known.best_head is None else f" (head of module {known.best_head})"
    if report.classifier is not None and known.best_head == report.classifier.index:
        head = " (the network's own classifier)"
    kind = f" ({known.head}, as those before it)" if known.head and report.classifier is not None else ""
    parts = [
        f"{what} {format_metric(value, report.metric)}{note}"
        for what, value, note in (
            ("best head by validation", known.best_head_val, _rmse(known.best_head_val_rmse) + head),
            ("last module's head", known.last_module_val if report.classifier is not None else None, kind),
            ("own classifier" if report.classifier is not None else "last head", known.last_head_val, ""),
            ("ensemble", known.ensemble_val, ""),
            ("test", known.test, _rmse(known.test_rmse)),
        )
        if value is not None
    ]
    samples = report.workload.get("samples", {})
    judged = [
        f"{samples[split]:,} {word}" for split, word in (("val", "validation"), ("test", "test")) if split in samples
    ]
    return f"{', '.join(parts)} ({' and '.join(judged)} samples)" if parts and judged else ", ".join(parts) or None


def _rmse(error: float | None) -> str:
    return "" if error is None else f" (RMSE {error:.4g})"
