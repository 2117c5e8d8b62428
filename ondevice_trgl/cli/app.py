"""The commands put together."""

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import typer

from ondevice_trgl.cli import profiles, runs
from ondevice_trgl.cli.compare import run_compare
from ondevice_trgl.cli.env import run_env
from ondevice_trgl.cli.evaluate import run_evaluate
from ondevice_trgl.cli.export import run_export
from ondevice_trgl.cli.guard import guarded
from ondevice_trgl.cli.options import COMPARING, OUTPUT, RUNNING, TRAINING, Command, takes
from ondevice_trgl.cli.plan import run_plan
from ondevice_trgl.cli.predict import run_predict
from ondevice_trgl.cli.report import run_report
from ondevice_trgl.cli.resume import run_resume
from ondevice_trgl.cli.shell import PROGRAM, Shell
from ondevice_trgl.cli.train import run_train

app = typer.Typer(
    name=PROGRAM,
    help="Train neural networks under a memory budget, one module at a time, and see what it saved.",
    epilog=f"Start with: {PROGRAM} train --budget 2GB",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run_train_or_plan(shell: Shell, given: dict[str, Any]) -> int:
    """Train a network under a memory budget, one module at a time, and report what it saved."""
    return (run_plan if given["dry_run"] else run_train)(shell, given)


COMMANDS: tuple[tuple[str, Command, tuple[str, ...], str, str], ...] = (
    ("plan", run_plan, (*TRAINING, "pareto"), "--model resnet18 --data cifar10 -b 600MB", "Train"),
    ("train", run_train_or_plan, (*TRAINING, "dry_run"), "--model resnet18 --data cifar10 -b 600MB", "Train"),
    ("compare", run_compare, COMPARING, "--model resnet18 --data cifar10 -b 400MB,600MB --epochs 1", "Train"),
    ("resume", run_resume, ("run", "budget", *RUNNING, *OUTPUT), "runs/resnet18-cifar10", "Train"),
    (
        "evaluate",
        run_evaluate,
        ("run", "judged_head", "other_data", "classes_from_order", "data_root", "budget", "allocator", *OUTPUT),
        "RUN --data folder:holdout",
        "Use a run",
    ),
    (
        "predict",
        run_predict,
        ("run", "paths", "judged_head", "top", "budget", "allocator", *OUTPUT),
        "RUN picture.jpg",
        "Use a run",
    ),
    ("report", run_report, ("run", "html", "format", "force", *OUTPUT), "RUN --html report.html", "Use a run"),
    (
        "export",
        run_export,
        ("run", "use_head", "export_format", "output", "force", "allocator", *OUTPUT),
        "RUN -o FILE",
        "Use a run",
    ),
    ("env", run_env, ("allocator", *OUTPUT), "", "This machine"),
)
"""Name, what it runs, its options, an example of them, and where `--help` lists it."""
for name, command, options, example, panel in COMMANDS:
    app.command(name, rich_help_panel=panel)(takes(*options, example=f"{name} {example}".strip())(command))
app.add_typer(runs.app, name="runs", rich_help_panel="Use a run")
app.add_typer(profiles.app, name="profiles", rich_help_panel="This machine")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(version("ondevice_trgl"))
        except PackageNotFoundError:
            typer.echo("not installed: run from a source tree")
        raise typer.Exit()


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options before the command."""


def run(argv: Sequence[str] | None) -> int:
    """Parse `argv`, run its command, give the exit code. Every error ends here as a line on stderr."""
    args = list(sys.argv[1:] if argv is None else argv)
    shell = Shell(
        command=shlex.join([PROGRAM, *args]), verbose=bool(os.environ.get("TRGL_DEBUG")), own_process=argv is None
    )

    def parse_and_run() -> int:
        try:
            code = typer.main.get_command(app).main(
                args=args or ["--help"], prog_name=PROGRAM, standalone_mode=False, obj=shell
            )
        except typer.Abort:
            return 130
        except Exception as error:
            if (message := _usage_message(error)) is None:
                raise
            where = getattr(getattr(error, "ctx", None), "command_path", PROGRAM)
            return shell.complain(message, hint=f"`{where} --help` lists what it takes", code=2)
        return code if isinstance(code, int) else 0

    return guarded(parse_and_run, shell)


def _usage_message(error: Exception) -> str | None:
    # by shape, not by class: where that class lives differs between the versions of typer
    render = getattr(error, "format_message", None)
    return str(render()) if callable(render) and getattr(error, "exit_code", None) == 2 else None
