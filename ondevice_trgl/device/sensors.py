"""What a device says of itself while it works: how hot it is, and how full its battery."""

import os
from pathlib import Path

import psutil

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


class Load:
    """What processes other than this one, and those that it starts, take of all cores."""

    def __init__(self) -> None:
        self._before = self._now()

    def percent(self) -> float | None:
        """In the mean since it was last asked, or was made; None where the system does not tell."""
        now = self._now()
        busy, own, whole = (b - a for a, b in zip(self._before, now, strict=True))
        self._before = now
        return 100.0 * min(1.0, max(0.0, busy - own) / whole) if whole > 0.0 else 0.0

    def _now(self) -> tuple[float, float, float]:
        """Seconds of all cores since the start: busy, busy with this process, in all."""
        times = psutil.cpu_times()
        whole = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # counted in user
        own = os.times()
        taken = own.user + own.system + own.children_user + own.children_system
        return whole - times.idle - getattr(times, "iowait", 0.0), taken, whole


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
