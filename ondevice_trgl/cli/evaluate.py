"""`trgl-device evaluate`: the accuracy of a trained run."""

from pathlib import Path
from typing import Any

from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.errors import UsageError
from ondevice_trgl.report.table import Span, format_fraction


def parse_head(text: str) -> str | int:
    """ "best", "last" or the index of a module. Raises UsageError."""
    if text in ("best", "last"):
        return text
    if text.isascii() and text.isdigit():
        return int(text)
    raise UsageError(
        f"--head {text!r} is not a head", hint="best, last, or the number of a module as the report shows it"
    )


def run_evaluate(shell: Shell, given: dict[str, Any]) -> int:
    """Reload RUN's trained model and print its accuracy."""
    head = str(parse_head(given["use_head"]))
    from ondevice_trgl import jobs

    result = jobs.evaluate_run(Path(given["run"]), head=head, data=given["other_data"], data_root=given["data_root"])
    if shell.json:
        shell.record(result)
        return 0
    what = f"on {result['samples']:,} samples of {result['data']}, head of module {result['head']}"
    shell.lines([(Span(f"accuracy {format_fraction(result['accuracy'])}", "title"), Span(f" {what}"))])
    if result["matches_report"] is not None:
        same = result["matches_report"]
        text = "the same as in the run's report" if same else "NOT the same as in the run's report"
        shell.lines([(Span(text, "good" if same else "bad"),)])
    return 0
