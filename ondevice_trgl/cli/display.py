"""Which display a training gets."""

import os
import sys

from ondevice_trgl.cli.progress import PlainProgress, Progress
from ondevice_trgl.cli.shell import Shell


def make_progress(mode: str, shell: Shell) -> Progress:
    """`mode` is --progress: auto (live where stderr is a terminal that can move its cursor), plain or none."""
    if shell.quiet or mode == "none":
        return Progress()
    if mode == "auto" and sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
        from ondevice_trgl.cli.live import LiveProgress  # imports rich

        return LiveProgress(no_color=shell.no_color)
    return PlainProgress(sys.stderr)
