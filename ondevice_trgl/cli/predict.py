"""`trgl-device predict`: which class a trained run sees in pictures."""

from pathlib import Path
from typing import Any

from ondevice_trgl.cli.evaluate import over_budget, parse_head, peak_lines
from ondevice_trgl.cli.process import prepare_process
from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.cli.signals import PauseOnSignal
from ondevice_trgl.data.entries import shown
from ondevice_trgl.errors import UsageError
from ondevice_trgl.policy import parse_budget
from ondevice_trgl.report.table import Cell, format_fraction, make_table, table_lines
from ondevice_trgl.tasks import MULTI_LABEL, REGRESSION


def run_predict(shell: Shell, given: dict[str, Any]) -> int:
    """Print class and confidence of pictures, or the numbers that a regression gives, inside the run's budget.

    Pictures are read as in training.
    """
    head, top = str(parse_head(given["judged_head"], "ensemble")), _count(given["top"])
    if given["budget"] is not None:
        parse_budget(given["budget"], what="--budget")
    prepare_process(shell, "predict", given)
    from ondevice_trgl import jobs

    with PauseOnSignal():  # a signal ends it with its scratch files gone
        result = jobs.predict_run(
            Path(given["run"]), [Path(path) for path in given["paths"]], head=head, top=top, budget=given["budget"]
        )
    if shell.json:
        shell.record(result)
        return over_budget(result)
    for line in result["told"]:
        shell.note(f"data: {line}")
    table = make_table("Predictions", *_table(result["predictions"], result["task"]))
    shell.lines(table_lines(table, 10**6))  # never cut: a path is there to be copied
    shell.lines(peak_lines(result))
    return over_budget(result)


def _table(predictions: list[dict[str, Any]], task: str) -> tuple[tuple[str, ...], list[list[Cell]]]:
    """Headings and rows: of classes a row a class, of numbers a column each, of labels a row for each that is there."""
    rows: list[list[Cell]] = []
    if task == REGRESSION:
        names = tuple(predictions[0]["values"]) if predictions else ()
        for one in predictions:
            rows.append([shown(one["file"]), *(f"{one['values'][name]:.4g}" for name in names)])
        return ("<file", *names), rows
    for one in predictions:
        if task == MULTI_LABEL:
            found = [(name, one["confidences"][name]) for name in one["labels"]] or [("none", None)]
        else:
            found = [(likely["class"], likely["confidence"]) for likely in one["top"]]
        for number, (name, share) in enumerate(found):
            rows.append(["" if number else shown(one["file"]), name, format_fraction(share)])
    return ("<file", "<label" if task == MULTI_LABEL else "<class", "confidence"), rows


def _count(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) >= 1:
        return int(text)
    raise UsageError(f"--top {text!r} is not a whole number of at least 1", hint="for example --top 3")
