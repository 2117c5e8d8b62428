"""Where a run, or a module of it, ended before all epochs and modules: in words."""

from ondevice_trgl.report.model import ModuleReport, Report


def ended(module: ModuleReport, report: Report) -> str:
    """Behind the name of `module`: that it was not trained, or which epoch it is of."""
    if report.stopped_behind is not None and module.index > report.stopped_behind:
        return " (not trained)"
    if module.best_epoch is None or not module.epochs:
        return ""
    return f" (epoch {module.best_epoch + 1} of {round(module.epochs / report.plan.laps)})"


def stopped_line(report: Report) -> str | None:
    """Why modules were not trained; None where all were."""
    if report.stopped_behind is None:
        return None
    left = [f"module {module.index}" for module in report.modules if module.index > report.stopped_behind]
    own = ["the network's own classifier"] if report.classifier is not None else []
    return (
        f"behind module {report.stopped_behind}: two modules in a row were not above the best before them by more than "
        f"its standard error on the validation set; not trained: {', '.join([*left, *own])}"
    )
