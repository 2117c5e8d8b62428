"""`trgl-device resume`: go on where a run stopped."""

from pathlib import Path
from typing import Any

from ondevice_trgl.cli.display import make_progress
from ondevice_trgl.cli.options import OUTPUT, takes
from ondevice_trgl.cli.present import exit_code, show
from ondevice_trgl.cli.process import prepare_process
from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.cli.signals import PauseOnSignal


def run_resume(shell: Shell, given: dict[str, Any]) -> int:
    """Go on where RUN stopped: after a pause, a signal, a crash or a power cut."""
    prepare_process(shell, given["allocator"])
    from ondevice_trgl import jobs

    with PauseOnSignal() as signals, make_progress(given["progress"], shell) as progress:
        report = jobs.resume_job(Path(given["run"]), callbacks=(signals, progress))
    show(shell, report)
    return exit_code(report, signum=signals.signum)


command = takes("run", "allocator", "progress", "quiet", *OUTPUT, example="resume runs/resnet18-cifar10")(run_resume)
