"""`trgl-device plan`: what would fit, without training."""

from typing import Any

from ondevice_trgl.cli.present import show
from ondevice_trgl.cli.process import prepare_process
from ondevice_trgl.cli.settings import make_job, origin_lines, resolve_settings
from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.report.table import plain, table_lines
from ondevice_trgl.report.text import breakdown_table, pareto_table


def run_plan(shell: Shell, given: dict[str, Any]) -> int:
    """Show what fits the budget, what is chosen and why; train nothing."""
    resolved = resolve_settings(given)
    prepare_process(shell, "plan", given)
    settings = origin_lines(resolved, shell.width) if shell.verbose else []
    if shell.json and settings:
        shell.note("\n".join(plain(settings)))
    from ondevice_trgl import jobs

    told = None if shell.quiet or given["progress"] == "none" else shell.note
    if told is not None:
        shell.note(f"planning {resolved.workload.model} on {resolved.workload.data} within {resolved.config.budget}")
    report = jobs.plan_job(make_job(given, resolved, command=shell.command), told=told)
    if not shell.json and settings:
        shell.lines([*settings, ()])
    show(shell, report)
    if given.get("pareto") and not shell.json:
        shell.lines([(), *table_lines(pareto_table(report), shell.width)])
    if shell.verbose and not shell.json:
        shell.lines([(), *table_lines(breakdown_table(report), shell.width)])
    return 0
