"""What is printed once a report stands, and the exit code it amounts to."""

from pathlib import Path

from ondevice_trgl.cli.shell import PROGRAM, Shell
from ondevice_trgl.errors import BudgetExceededError
from ondevice_trgl.report.model import Report
from ondevice_trgl.report.table import Line, labelled
from ondevice_trgl.report.text import report_lines


def show(shell: Shell, report: Report) -> None:
    """The report on stdout: as JSON, or as tables with the files it stands in and what to do next."""
    if shell.json:
        shell.record(report.to_dict())
    else:
        shell.lines([*report_lines(report, shell.width), *_files(report), *_next(report)])


def exit_code(report: Report, *, signum: int | None = None) -> int:
    """0 done, 1 failed, 4 over the budget, 128 + signal where that is what paused the run."""
    if report.status == "paused":
        return 128 + signum if signum is not None else 0
    if report.status == "failed":
        return 1
    return BudgetExceededError.exit_code if report.held is False else 0


def _files(report: Report) -> list[Line]:
    if report.run_dir is None:
        return []
    files = [path for name in ("report.json", "report.html") if (path := Path(report.run_dir) / name).exists()]
    # never wrapped: a path is there to be copied
    return [line for path in files for line in labelled("report", str(path), 10**6)]


def _next(report: Report) -> list[Line]:
    command = {"completed": "evaluate", "paused": "resume", "failed": "resume"}.get(report.status)
    if command is None or report.run_dir is None:
        return []
    return labelled("next", f"{PROGRAM} {command} {report.run_dir}", 10**6)
