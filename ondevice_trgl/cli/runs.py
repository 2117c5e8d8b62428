"""`trgl-device runs`: the runs that there are, what they take on disk, and less of it."""

import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ondevice_trgl.cli.options import OUTPUT, takes
from ondevice_trgl.cli.settings import RUNS
from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.errors import RunDirError, UsageError
from ondevice_trgl.report.table import Span, make_table, table_lines
from ondevice_trgl.units import format_size

if TYPE_CHECKING:
    from ondevice_trgl.run.inventory import Run

app = typer.Typer(help="Runs on disk: list them, free what they hold.")
_UNCUT = 10_000
"""Columns of a table whose paths are to be copied."""
_TONES = {"completed": "good", "failed": "bad", "damaged": "bad"}


def run_list(shell: Shell, given: dict[str, Any]) -> int:
    """List the runs below FOLDER: how each stands, what it takes on disk, and when it was written last."""
    from ondevice_trgl.run.inventory import runs_below

    folders = [Path(name) for name in given["folders"] or ()] or ([RUNS] if RUNS.is_dir() else [])
    runs = _once(run for folder in folders for run in runs_below(folder))
    if shell.json:
        shell.record({"runs": [run.to_dict() for run in runs], "total_bytes": sum(run.total_bytes for run in runs)})
        return 0
    if not runs:
        shell.text(f"no runs below {', '.join(map(str, folders)) or RUNS}")
        return 0
    headings = ("<run", "<status", "<model", "<data", "budget", "weights", "cache", "rest", "<written")
    shell.lines(table_lines(make_table("Runs", headings, map(_row, runs)), _UNCUT))
    shell.text(f"{format_size(sum(run.total_bytes for run in runs))} in all")
    return 0


def _row(run: "Run") -> tuple[Span | str | None, ...]:
    return (
        str(run.path),
        Span(run.status, _TONES.get(run.status, "")),
        run.model,
        run.data,
        None if run.budget_bytes is None else format_size(run.budget_bytes),
        *(format_size(size) for size in (run.weights_bytes, run.cache_bytes, run.other_bytes)),
        None if run.written is None else datetime.fromtimestamp(run.written).strftime("%Y-%m-%d %H:%M"),
    )


def run_clean(shell: Shell, given: dict[str, Any]) -> int:
    """Free what RUN, or every run below FOLDER, holds on disk: its boundary cache, and what killed processes left.

    A run that was cleaned resumes all the same, only slower. With --all nothing of it is left. Runs in use stay.
    """
    if given["cache_alone"] and given["everything"]:
        raise UsageError("--cache and --all: the one is part of the other", hint="leave one out")
    from ondevice_trgl.run.cleaning import clean, clean_scratch
    from ondevice_trgl.run.inventory import is_run, runs_below
    from ondevice_trgl.run.lock import is_held

    named = [Path(name) for name in given["runs"]]
    runs = _once(run for path in named for run in runs_below(path))
    for path in named:
        if is_run(path) and is_held(path):
            raise RunDirError(f"{path} is in use: a process that is alive works on it", hint="wait, or stop it")
        if not is_run(path) and not any(run.path.is_relative_to(path) for run in runs):
            raise RunDirError(f"{path} is not a run directory and holds none", hint="`runs ls` lists those there are")
    if given["everything"] and not given["yes"]:
        _ask(runs)
    cleaned, in_use, left = list[dict[str, Any]](), list[str](), 0
    for run in runs:
        try:
            freed = clean(run, everything=given["everything"])
        except RunDirError:
            if run.path in named:
                raise
            in_use.append(str(run.path))
            continue
        cleaned.append({"run_dir": str(run.path), "freed_bytes": freed, "exists": run.path.is_dir()})
    for folder in named:
        if folder.is_dir() and not is_run(folder):
            left += clean_scratch(folder)
    freed = left + sum(one["freed_bytes"] for one in cleaned)
    for name in in_use:
        shell.note(f"left alone, as a process works on it: {name}")
    if shell.json:
        shell.record({"freed_bytes": freed, "runs": cleaned, "leftover_bytes": left, "in_use": in_use})
        return 0
    for one in cleaned:
        kept = given["everything"] and one["exists"]
        shell.text(f"{one['run_dir']}: {format_size(one['freed_bytes'])}{', other files are kept' if kept else ''}")
    shell.text(f"freed {format_size(freed)}")
    return 0


def _once(runs: Iterable["Run"]) -> list["Run"]:
    return list({run.path.resolve(): run for run in runs}.values())


def _ask(runs: list["Run"]) -> None:
    """Raises UsageError where nobody is there to answer, or the answer is no."""
    total = format_size(sum(run.total_bytes for run in runs))
    what = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}, {total}, weights and reports too"
    if not sys.stdin.isatty():
        raise UsageError(f"--all removes {what}, and nobody is there to be asked", hint="--yes removes without asking")
    print(*(f"  {run.path}" for run in runs), sep="\n", file=sys.stderr)
    if not typer.confirm(f"Remove {what}?", err=True):
        raise UsageError("nothing was removed", hint="without --all the cache alone goes")


app.command("ls")(takes("folders", *OUTPUT, example="runs ls")(run_list))
app.command("clean")(takes("runs", "cache_alone", "everything", "yes", *OUTPUT, example="runs clean runs")(run_clean))
