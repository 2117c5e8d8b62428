"""`trgl-device report`: the report of a run, on the terminal, as JSON or as a page."""

from pathlib import Path
from typing import Any

from ondevice_trgl.cli.present import show
from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.errors import StorageError, UsageError
from ondevice_trgl.report.model import read_report
from ondevice_trgl.run.run_dir import RECORD, RunDir


def run_report(shell: Shell, given: dict[str, Any]) -> int:
    """Show the report of RUN on the terminal, as JSON, as Markdown, or as a self-contained HTML page."""
    run = Path(given["run"])
    if (run / RECORD).exists():
        RunDir.open(run)
    report = read_report(run)
    if given["format"] == "markdown" and (given["html"] is not None or shell.json):
        raise UsageError("--format markdown is printed by itself", hint="leave out --html, and --json")
    if given["format"] == "markdown":
        from ondevice_trgl.report.markdown import to_markdown

        shell.text(to_markdown(report).rstrip())
        return 0
    if given["html"] is None:
        show(shell, report)
        return 0
    from ondevice_trgl.report.html import to_html

    target = Path(given["html"])
    if target.exists() and not given["force"]:
        raise UsageError(f"{target} is already there", hint="--force writes over it")
    try:
        target.write_text(to_html(report), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}") from None
    if shell.json:
        shell.record({"html": str(target), "bytes": target.stat().st_size})
    else:
        shell.text(str(target))
    return 0
