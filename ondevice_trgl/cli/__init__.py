"""The command line: `main` parses, runs one command and gives the exit code. The only importer of typer and rich."""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run `trgl-device` with `argv` (the process's own where None) and return the exit code; never raises."""
    from ondevice_trgl.cli.app import run

    return run(argv)
