"""`trgl-device profiles`: the device profiles that --profile takes."""

from typing import Any

import typer

from ondevice_trgl.cli.env import fact_lines
from ondevice_trgl.cli.options import OUTPUT, takes
from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.report.table import make_table, table_lines
from ondevice_trgl.units import format_size

app = typer.Typer(help="Device profiles, for --profile.")


def run_list(shell: Shell, given: dict[str, Any]) -> int:
    """List the profiles that come with the program."""
    from ondevice_trgl.device.profile import load_profile, profile_names

    profiles = [load_profile(name) for name in profile_names()]
    if shell.json:
        shell.record({"profiles": [profile.to_dict() for profile in profiles]})
        return 0
    rows = [
        (p.name, format_size(p.ram_bytes), format_size(p.default_budget), str(p.threads), p.device, p.title)
        for p in profiles
    ]
    table = make_table("Profiles", ("<name", "ram", "budget", "threads", "<device", "<title"), rows)
    shell.lines(table_lines(table, shell.width))
    return 0


def run_show(shell: Shell, given: dict[str, Any]) -> int:
    """Show one profile, by name or from a TOML file."""
    from ondevice_trgl.device.profile import load_profile

    facts = load_profile(given["name"]).to_dict()
    if shell.json:
        shell.record(facts)
    else:
        shell.lines(fact_lines(facts))
    return 0


app.command("ls")(takes(*OUTPUT, example="profiles ls")(run_list))
app.command("show")(takes("name", *OUTPUT, example="profiles show raspberry-pi-4-2gb")(run_show))
