"""What a network may learn of a sample, and what goes with each: its loss, its metric, how the metric is written.

Imports no torch: settings, reports and processes that stay small use it.
"""

AUTO = "auto"
CLASSES, REGRESSION, MULTI_LABEL = KINDS = ("classes", "regression", "multi-label")
"""One class of several, as its number; numbers; several labels at once, each there or not, as 0 or 1."""
ACCURACY, R2, F1 = "accuracy", "r2", "f1"
METRICS = {CLASSES: ACCURACY, REGRESSION: R2, MULTI_LABEL: F1}
"""Larger is better. accuracy: the share that is got right. r2: 1 - squared error / variance of the targets, the mean
over them. f1: of each label at probability 0.5, the mean over labels (macro F1)."""
CROSS_ENTROPY, MSE, BCE = "cross-entropy", "mse", "bce"
LOSSES = {CLASSES: CROSS_ENTROPY, REGRESSION: MSE, MULTI_LABEL: BCE}
"""mse: mean squared error over samples and targets. bce: binary cross-entropy with logits, the mean over both."""
_TITLES = {R2: "R2", F1: "F1"}


def metric_title(metric: str) -> str:
    """The metric at the head of a line or column; one of a user's own by its name, without the package."""
    return _TITLES.get(metric, metric.rpartition(":")[2])


def format_metric(value: float | None, metric: str) -> str | None:
    """A figure of `metric`: accuracy as a percentage, others as the number that they are."""
    if value is None:
        return None
    return f"{100 * value:.1f}%" if metric == ACCURACY else f"{value:.3f}" if metric in _TITLES else f"{value:.4g}"


def format_gain(gain: float | None, metric: str) -> str:
    """The difference of two figures, in words: "3.2 points above"."""
    gain = gain or 0.0
    size = f"{abs(100 * gain):.1f}" if metric == ACCURACY else format_metric(abs(gain), metric) or ""
    if not float(size):
        return "equal"
    return f"{size}{' points' if metric == ACCURACY else ''} {'above' if gain > 0 else 'below'}"
