"""Byte sizes and intervals as people write them. Inside the package bytes are always `int`."""

import re
from decimal import Decimal
from typing import NamedTuple

from ondevice_trgl.errors import SizeError, UsageError

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}{suffix}": 1000**power for power, letter in enumerate("kmgt", 1) for suffix in ("", "b")},
    **{f"{letter}i{suffix}": 1024**power for power, letter in enumerate("kmgt", 1) for suffix in ("", "b")},
}
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_INTERVAL = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", re.ASCII)
_SIZE = re.compile(r"\s*([+-]?\d+(?:_\d+)*(?:\.\d+)?)\s*([a-zA-Z]*)\s*", re.ASCII)
_MOST_TEXT = 60


def parse_size(text: str | int, *, what: str = "size") -> int:
    """Bytes in `text`: `"2GB"` is 2·10^9, `"2GiB"` is 2·2^30, a bare number is bytes.

    Raises SizeError where it cannot be read or is not positive; `what` names the value in the message.
    """
    if isinstance(text, bool):
        raise SizeError(f"{what} {text!r} is not a byte size", hint="write it like 600MB or 2GiB")
    if isinstance(text, int):
        number, unit = Decimal(text), ""
    else:
        match = _SIZE.fullmatch(text) if isinstance(text, str) and len(text) <= _MOST_TEXT else None
        if match is None or match[2].lower() not in _UNITS:
            raise SizeError(
                f"{what} {text!r} is not a byte size",
                hint="write a number and a unit, like 600MB (10^6) or 2GiB (2^30); units: B, KB to TB, KiB to TiB",
            )
        number, unit = Decimal(match[1].replace("_", "")), match[2].lower()
    size = int(number * _UNITS[unit])
    if size <= 0:
        raise SizeError(f"{what} {text!r} must be more than zero bytes", hint="write it like 600MB or 2GiB")
    return size


def format_size(size: int | float) -> str:
    """`size` bytes in KiB, MiB or GiB, three digits or so: for people, never for parsing."""
    sign, value = ("-", -size) if size < 0 else ("", size)
    if value < 1024:
        return f"{sign}{value:.0f} B"
    for unit in ("KiB", "MiB"):
        value /= 1024
        if value < 1024:
            return f"{sign}{value:.1f} {unit}" if value < 10 else f"{sign}{value:.0f} {unit}"
    return f"{sign}{value / 1024:.2f} GiB"


class Interval(NamedTuple):
    """Either seconds or steps."""

    seconds: float | None
    steps: int | None


def parse_interval(text: str) -> Interval:
    """ "90s", "5min", "1h", or "200 steps". Raises UsageError where it cannot be read or is not positive."""
    match = _INTERVAL.fullmatch(text) if len(text) <= _MOST_TEXT else None
    number, unit = (match[1], match[2]) if match else ("0", "")
    if unit in ("step", "steps") and number.isdecimal() and int(number):
        return Interval(None, int(number))
    if unit in _SECONDS and float(number):
        return Interval(float(number) * _SECONDS[unit], None)
    raise UsageError(f"{text!r} is no interval", hint="write it like 30s, 5min, 1h or 200steps")
