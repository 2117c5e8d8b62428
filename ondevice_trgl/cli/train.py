"""`trgl-device train`: plan, train and report."""

from typing import Any

from ondevice_trgl.cli.display import make_progress
from ondevice_trgl.cli.present import exit_code, show
from ondevice_trgl.cli.process import prepare_process
from ondevice_trgl.cli.settings import make_job, origin_lines, resolve_settings
from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.cli.signals import PauseOnSignal
from ondevice_trgl.report.table import plain


def run_train(shell: Shell, given: dict[str, Any]) -> int:
    """Train a network under a memory budget, one module at a time, and report what it saved."""
    resolved = resolve_settings(given)
    prepare_process(shell, "train", given)
    if shell.verbose:
        shell.note("\n".join(plain(origin_lines(resolved, shell.width))))
    from ondevice_trgl import jobs

    job = make_job(given, resolved, command=shell.command)
    if given["progress"] != "none":
        shell.note(
            f"training {resolved.workload.model} on {resolved.workload.data} within {resolved.config.budget}, "
            f"into {job.run_dir}"
        )
    with PauseOnSignal() as signals, make_progress(given["progress"], shell) as progress:
        told = None if shell.quiet or given["progress"] == "none" else shell.note
        report = jobs.train_job(job, callbacks=(signals, progress), told=told)
    show(shell, report)
    return exit_code(report, signum=signals.signum)
