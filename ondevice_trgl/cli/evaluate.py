"""`trgl-device evaluate`: the accuracy of a trained run, or its task's metric."""

from pathlib import Path
from typing import Any

from ondevice_trgl.cli.process import prepare_process
from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.cli.signals import PauseOnSignal
from ondevice_trgl.errors import BudgetExceededError, UsageError
from ondevice_trgl.policy import parse_budget
from ondevice_trgl.report.table import Line, Span
from ondevice_trgl.tasks import format_metric, metric_title
from ondevice_trgl.units import format_size


def parse_head(text: str, *more: str) -> str | int:
    """ "best", "last", one of `more`, or the index of a module. Raises UsageError."""
    if text in ("best", "last", *more):
        return text
    if text.isascii() and text.isdigit():
        return int(text)
    raise UsageError(
        f"--head {text!r} is not a head",
        hint=f"{', '.join(('best', 'last', *more))}, or the number of a module as the report shows it",
    )


def run_evaluate(shell: Shell, given: dict[str, Any]) -> int:
    """Print the accuracy of RUN's trained model, measured module by module inside the run's budget."""
    head = str(parse_head(given["judged_head"], "ensemble"))
    if given["budget"] is not None:
        parse_budget(given["budget"], what="--budget")
    if given["classes_from_order"] and given["other_data"] is None:
        raise UsageError(
            "--classes-from-order is for other data than the run's own",
            hint="name them, for example --data folder:PATH",
        )
    prepare_process(shell, "evaluate", given)
    from ondevice_trgl import jobs

    with PauseOnSignal():  # a signal ends it with its scratch files gone
        result = jobs.evaluate_run(
            Path(given["run"]),
            head=head,
            data=given["other_data"],
            data_root=given["data_root"],
            budget=given["budget"],
            by_order=given["classes_from_order"],
        )
    code = over_budget(result)
    if shell.json:
        shell.record(result)
        return code
    which = "all heads together" if result["head"] == "ensemble" else f"head of module {result['head']}"
    what = f"on {result['samples']:,} samples of {result['data']}, {which}"
    for line in result["told"]:
        shell.note(f"data: {line}")
    metric, rmse = result["metric"], result["rmse"]
    figure = f"{metric_title(metric)} {format_metric(result['accuracy'], metric)}"
    figure += f" (RMSE {rmse:.4g})" if rmse is not None else ""
    shell.lines([(Span(figure, "title"), Span(f" {what}"))])
    if result["matches_report"] is not None:
        same = result["matches_report"]
        text = "the same as in the run's report" if same else "NOT the same as in the run's report"
        shell.lines([(Span(text, "good" if same else "bad"),)])
    shell.lines(peak_lines(result))
    return code


def over_budget(result: dict[str, Any]) -> int:
    """The exit code that the measured peak calls for."""
    peak, budget = result["measured_peak_bytes"], result["budget_bytes"]
    return BudgetExceededError.exit_code if budget is not None and peak > budget else 0


def peak_lines(result: dict[str, Any]) -> list[Line]:
    """The measured peak against the budget."""
    peak, budget = result["measured_peak_bytes"], result["budget_bytes"]
    text = f"measured peak {format_size(peak)}" + (f" of {format_size(budget)}" if budget is not None else "")
    return [(Span(text, "bad" if over_budget(result) else ""),)]
