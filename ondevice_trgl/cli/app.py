"""The commands put together, and the one place where an exception becomes an exit code."""

import contextlib
import os
import shlex
import sys
from collections.abc import Sequence

import typer

from ondevice_trgl.cli import env, evaluate, export, plan, profiles, report, resume, train
from ondevice_trgl.cli.shell import PROGRAM, Shell
from ondevice_trgl.cli.signals import Stopped
from ondevice_trgl.errors import TrglError

app = typer.Typer(
    name=PROGRAM,
    help="Train neural networks under a memory budget, one module at a time, and see what it saved.",
    epilog=f"Start with: {PROGRAM} train --budget 2GB",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command, panel in (
    ("plan", plan.command, "Train"),
    ("train", train.command, "Train"),
    ("resume", resume.command, "Train"),
    ("evaluate", evaluate.command, "Use a run"),
    ("report", report.command, "Use a run"),
    ("export", export.command, "Use a run"),
    ("env", env.command, "This machine"),
):
    app.command(name, rich_help_panel=panel)(command)
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
    try:
        code = _dispatch(args, shell)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # whoever read stdout has gone; without this the interpreter complains once more as it flushes at exit
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(args: list[str], shell: Shell) -> int:
    try:
        code = typer.main.get_command(app).main(
            args=args or ["--help"], prog_name=PROGRAM, standalone_mode=False, obj=shell
        )
        return code if isinstance(code, int) else 0
    except Stopped as stop:
        shell.note("stopped")
        return 128 + stop.signum
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 1
    except TrglError as error:
        return shell.fail(error)
    except BrokenPipeError:
        raise
    except Exception as error:
        if (message := _usage_message(error)) is not None:
            where = getattr(getattr(error, "ctx", None), "command_path", PROGRAM)
            return shell.complain(message, hint=f"`{where} --help` lists what it takes", code=2)
        return shell.crash(error)


def _usage_message(error: Exception) -> str | None:
    # by shape, not by class: where that class lives differs between the versions of typer
    render = getattr(error, "format_message", None)
    return str(render()) if callable(render) and getattr(error, "exit_code", None) == 2 else None
