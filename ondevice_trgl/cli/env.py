"""`trgl-device env`: this machine and this installation, to be pasted into a bug report."""

from typing import Any

from ondevice_trgl.cli.process import prepare_process
from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.report.table import Line, Span
from ondevice_trgl.units import format_size


def run_env(shell: Shell, given: dict[str, Any]) -> int:
    """Describe this machine and installation, ready to be pasted: as a training started here would find them."""
    prepare_process(shell, "env", given)
    import torch

    from ondevice_trgl.device.environment import describe_environment, describe_metering

    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = describe_environment(threads=torch.get_num_threads(), device=device) | describe_metering(device)
    if shell.json:
        shell.record(facts)
    else:
        shell.lines(fact_lines(facts))
    return 0


def fact_lines(facts: dict[str, Any]) -> list[Line]:
    """One line a fact, sizes as people read them; unknown ones read "-"."""
    width = max((len(name) for name in facts), default=0) + 2
    return [
        (Span(f"{_label(name):<{width}}", "dim"), Span(text))
        for name, value in facts.items()
        for text in _texts(name, value)
    ]


def _label(name: str) -> str:
    return name.removesuffix("_per_second").removesuffix("_bytes").replace("_", " ")


def _texts(name: str, value: Any) -> list[str]:
    if isinstance(value, list | tuple):
        return [str(item) for item in value] or ["-"]
    if value is None:
        return ["-"]
    if isinstance(value, int) and name.endswith("_bytes_per_second"):
        return [f"{format_size(value)}/s"]
    return [format_size(value) if isinstance(value, int) and name.endswith("_bytes") else str(value)]
