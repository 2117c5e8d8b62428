"""Where a setting comes from: flag over config file over profile over default."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ondevice_trgl import bounded, checks
from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.errors import ConfigError


@dataclass(frozen=True)
class Resolved:
    """Workload and configuration with the place that each value came from: flag, config, profile or default."""

    workload: Workload
    config: TrainConfig
    origins: Mapping[str, str]


def read_toml(path: Path) -> dict[str, Any]:
    """The flat table of settings in a TOML file. Raises ConfigError where it is absent or cannot be read."""
    try:
        return bounded.read_toml(path)
    except OSError as error:
        raise ConfigError([f"cannot read {path}: {error.strerror}"], hint="check the path given to --config") from None
    except ValueError as error:
        raise ConfigError([f"not valid TOML: {error}"], source=str(path)) from None


def resolve(
    flags: Mapping[str, Any],
    *,
    file: Mapping[str, Any] | None = None,
    file_name: str = "config file",
    profile: Mapping[str, Any] | None = None,
) -> Resolved:
    """Flag over config file over profile over default; None means "not given". Raises ConfigError with every fault.

    Keys are field names of Workload and TrainConfig, with `-` or `_`.
    """
    known = {f.name: (cls, f) for cls in (Workload, TrainConfig) for f in fields(cls)}
    values: dict[str, Any] = {}
    origins = dict.fromkeys(known, "default")
    faults: list[str] = []
    for origin, given in (("profile", profile or {}), (file_name, file or {}), ("flag", flags)):
        for written, value in given.items():
            name = written.replace("-", "_")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                faults.append(f"{written}: no such setting" + (f"; did you mean {near[0]!r}?" if near else ""))
            elif value is not None:
                values[name], origins[name] = value, origin
    faults += [
        f"{fault} (from {origins[name]})"
        for name, value in values.items()
        if (fault := checks.fault_of(known[name][1], value)) is not None
    ]
    if faults:
        raise ConfigError(faults, hint="`trgl-device train --help` lists every setting")
    parts = {
        cls: cls(**{name: value for name, value in values.items() if known[name][0] is cls})
        for cls in (Workload, TrainConfig)
    }
    workload, config = parts[Workload], parts[TrainConfig]
    assert isinstance(workload, Workload) and isinstance(config, TrainConfig)
    return Resolved(workload, config, origins)
