"""What a device says of itself while it works: how hot it is, and how full its battery."""

from pathlib import Path

_SYS = Path("/sys")
_HIGHEST = 150.0
"""Degrees: a zone that says more, or less than nothing, is not connected."""


def celsius(sys: Path = _SYS) -> float | None:
    """The hottest thermal zone of the machine, in degrees; None where none can be read."""
    found = []
    for zone in sorted((sys / "class" / "thermal").glob("thermal_zone*")):
        value = _number(zone / "temp")
        if value is not None and 0.0 < value / 1000.0 < _HIGHEST:
            found.append(value / 1000.0)
    return max(found, default=None)


def battery_percent(sys: Path = _SYS) -> float | None:
    """Charge of the emptiest battery that the machine runs on; 100 while it is charged; None where there is none."""
    found = []
    for supply in sorted((sys / "class" / "power_supply").glob("*")):
        if _text(supply / "type") != "Battery" or _text(supply / "scope") == "Device":  # that of a mouse is no matter
            continue
        charge = _number(supply / "capacity")
        if charge is not None:
            found.append(charge if _text(supply / "status") == "Discharging" else 100.0)
    return min(found, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None
