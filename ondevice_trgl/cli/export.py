"""`trgl-device export`: the trained model, out of a run."""

from pathlib import Path
from typing import Any

from ondevice_trgl.cli.evaluate import parse_head
from ondevice_trgl.cli.process import prepare_process
from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.cli.signals import PauseOnSignal


def run_export(shell: Shell, given: dict[str, Any]) -> int:
    """Write RUN's trained model to a file of its own."""
    head = parse_head(given["use_head"])
    prepare_process(shell, "export", given)
    run = Path(given["run"])
    output = Path(given["output"] or f"{run.resolve().name}.safetensors")
    from ondevice_trgl.export import export_run

    with PauseOnSignal():  # a signal ends it with its unfinished file gone
        written = export_run(run, format=given["export_format"], head=head, output=output, force=given["force"])
    if shell.json:
        shell.record({"path": str(written), "bytes": written.stat().st_size, "format": given["export_format"]})
    else:
        shell.text(str(written))
    return 0
