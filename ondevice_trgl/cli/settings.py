"""From flags, a config file and a profile to a Job."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ondevice_trgl.config import DEFAULTS, IN_FILES, Workload
from ondevice_trgl.errors import UsageError
from ondevice_trgl.report.table import Line, Span, make_table, table_lines
from ondevice_trgl.resolved import Resolved, read_toml, resolve
from ondevice_trgl.units import format_size

if TYPE_CHECKING:
    from ondevice_trgl.job import Job

RUNS = Path("runs")
"""Where runs go that are given no folder."""


def resolve_settings(given: Mapping[str, Any]) -> Resolved:
    """Flag over config file over profile over default.

    Raises ConfigError with every fault, UsageError where none of them states a budget.
    """
    flags = {name: given[name] for name in DEFAULTS if given.get(name) is not None}
    if "modules" in flags:
        flags["modules"] = parse_modules(flags["modules"])
    if "weights_skip" in flags:
        flags["weights_skip"] = _split(flags["weights_skip"])
    if "augment" in flags:
        flags["augment"] = _split(flags["augment"])
    if "lr_steps" in flags:
        flags["lr_steps"] = tuple(_number(text, float) for text in _split(flags["lr_steps"]))
    if flags.get("class_weights", "balanced") != "balanced":
        flags["class_weights"] = tuple(_number(text, float) for text in _split(flags["class_weights"]))
    if "tau" in flags:
        flags["tau"] = _number(flags["tau"], float)
    if "micro_batch" in flags:
        flags["micro_batch"] = _number(flags["micro_batch"], int)
    file = given.get("config")
    profile: Mapping[str, Any] | None = None
    if given.get("profile") is not None:
        from ondevice_trgl.device.profile import load_profile, settings

        profile = settings(load_profile(given["profile"]))
    resolved = resolve(
        flags, file=read_toml(Path(file)) if file else None, file_name=file or "config file", profile=profile
    )
    if resolved.config.budget is None:
        raise _no_budget()
    return resolved


def parse_modules(text: str) -> str | int | tuple[str, ...]:
    """ "auto", a number, or names between commas."""
    if text == "auto":
        return text
    number = _number(text, int)
    if isinstance(number, int):
        return number
    return _split(text)


def _split(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _number(text: str, kind: type[int] | type[float]) -> str | int | float:
    """The number in `text`, or `text` as it is, for the check of the setting to judge."""
    try:
        return kind(text)
    except ValueError:
        return text


def _no_budget() -> UsageError:
    from ondevice_trgl.device.profile import detect

    machine = detect()
    unit, name = (10**9, "GB") if machine.default_budget >= 10**9 else (10**6, "MB")
    digits = str(machine.default_budget // unit)
    suggestion = f"{digits[0]}{'0' * (len(digits) - 1)}{name}"
    return UsageError(
        f"no memory budget: say how much training may take; this machine has {format_size(machine.ram_bytes)} of RAM",
        hint=f"for example --budget {suggestion}, which leaves room for the rest of this machine; "
        "or name a device with --profile",
    )


def run_directory(given: Mapping[str, Any], workload: Workload) -> Path:
    """What --run-dir says, or a folder in `runs/` that is not taken yet."""
    if given.get("run_dir") is not None:
        return Path(given["run_dir"])
    kind, _, rest = workload.data.partition(":")
    data = f"{kind}-{Path(rest).name}" if kind in IN_FILES else workload.data
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{workload.model}-{data}").strip(".-")[:80] or "run"
    path, number = RUNS / name, 1
    while path.exists():
        number += 1
        path = RUNS / f"{name}-{number}"
    return path


def make_job(given: Mapping[str, Any], resolved: Resolved, *, command: str) -> "Job":
    """The Job that the flags describe."""
    from ondevice_trgl.device.profile import load_profile
    from ondevice_trgl.job import Job

    profile = load_profile(given["profile"]) if given.get("profile") is not None else None
    return Job(
        workload=resolved.workload,
        config=resolved.config,
        run_dir=run_directory(given, resolved.workload),
        force=given["force"],
        baseline=given["baseline"],
        command=command,
        allocator=given["allocator"],
        flash_endurance_bytes=profile.flash_endurance_bytes if profile else None,
    )


def origin_lines(resolved: Resolved, width: int) -> list[Line]:
    """Every setting, its value and where that came from."""
    values = resolved.workload.to_dict() | resolved.config.to_dict()
    rows = [
        (name, _shown(values[name]), Span(origin, "dim" if origin == "default" else ""))
        for name, origin in resolved.origins.items()
    ]
    return table_lines(make_table("Settings", ("<setting", "<value", "<from"), rows), width)


def _shown(value: Any) -> str | None:
    return None if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)
