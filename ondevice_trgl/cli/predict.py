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


def run_predict(shell: Shell, given: dict[str, Any]) -> int:
    """Print class and confidence of pictures, read as in training, inside the run's budget."""
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
    rows: list[list[Cell]] = []
    for found in result["predictions"]:
        for number, likely in enumerate(found["top"]):
            rows.append(
                ["" if number else shown(found["file"]), likely["class"], format_fraction(likely["confidence"])]
            )
    table = make_table("Predictions", ("<file", "<class", "confidence"), rows)
    shell.lines(table_lines(table, 10**6))  # never cut: a path is there to be copied
    shell.lines(peak_lines(result))
    return over_budget(result)


def _count(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) >= 1:
        return int(text)
    raise UsageError(f"--top {text!r} is not a whole number of at least 1", hint="for example --top 3")
