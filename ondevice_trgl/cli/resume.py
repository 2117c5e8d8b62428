"""`trgl-device resume`: go on where a run stopped."""

from pathlib import Path
from typing import Any

from ondevice_trgl.cli.display import make_progress
from ondevice_trgl.cli.present import exit_code, show
from ondevice_trgl.cli.process import prepare_process
from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.cli.signals import PauseOnSignal
from ondevice_trgl.policy import parse_budget


def run_resume(shell: Shell, given: dict[str, Any]) -> int:
    """Go on where RUN stopped: after a pause, a signal, a crash or a power cut. --budget may be another than before."""
    if given["budget"] is not None:
        parse_budget(given["budget"], what="--budget")
    prepare_process(shell, "resume", given)
    from ondevice_trgl import jobs

    with PauseOnSignal() as signals, make_progress(given["progress"], shell) as progress:
        report = jobs.resume_job(Path(given["run"]), callbacks=(signals, progress), budget=given["budget"])
    show(shell, report)
    return exit_code(report, signum=signals.signum)
