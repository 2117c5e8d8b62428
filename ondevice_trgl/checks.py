"""What may be set to what: a check says what was expected, or nothing; a record of settings runs them all."""

import dataclasses
import difflib
import math
import os
import reprlib
from collections.abc import Callable
from dataclasses import field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from ondevice_trgl.errors import ConfigError, SizeError, UsageError
from ondevice_trgl.policy import parse_budget
from ondevice_trgl.units import parse_interval, parse_size

Check = Callable[[Any], str | None]
_MOST_SHOWN = 500
_MOST_PATH, _MOST_NAME = 3800, 255
"""Bytes that Linux takes, with room for the names of files in a folder."""


def one_of(*valid: str) -> Check:
    def check(value: Any) -> str | None:
        if value in valid:
            return None
        near = difflib.get_close_matches(reprlib.repr(value).strip("'"), valid, n=1)
        return f"expected {' | '.join(valid)}" + (f"; did you mean {near[0]!r}?" if near else "")

    return check


def int_from(least: int, *, words: tuple[str, ...] = (), optional: bool = False, most: int = 2**63 - 1) -> Check:
    high = f" and at most {most}" if most < 2**63 - 1 else ""
    expected = f"expected a whole number of at least {least}{high}" + "".join(f" or {word!r}" for word in words)

    def check(value: Any) -> str | None:
        if (optional and value is None) or value in words:
            return None
        return None if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most else expected

    return check


def number(least: float, most: float, *, open_below: bool = False, words: tuple[Any, ...] = ()) -> Check:
    low = "above" if open_below else "of at least"
    high = f" and at most {most:g}" if math.isfinite(most) else ""
    expected = f"expected a number {low} {least:g}{high}" + "".join(f" or {word!r}" for word in words if word)

    def check(value: Any) -> str | None:
        if any(value is word or value == word for word in words):
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return expected
        inside = (value > least if open_below else value >= least) and value <= most
        return None if inside else expected

    return check


def size(value: Any) -> str | None:
    if value is None:
        return None
    try:
        parse_size(value)
    except SizeError as error:
        return f"{error.message.split(' ', 2)[-1]}; write it like 600MB or 2GiB"
    return None


def interval(value: Any) -> str | None:
    try:
        parse_interval(value if isinstance(value, str) else "")
    except UsageError:
        return "expected an interval like 30s, 5min, 1h or 200steps"
    return None


def budget(value: Any) -> str | None:
    if value is None or callable(value):
        return None
    try:
        parse_budget(value)
    except SizeError as error:
        return f"{error.message.split(' ', 2)[-1]}; {error.hint}"
    return None


def modules(value: Any) -> str | None:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return None
    if isinstance(value, tuple | list) and value and all(isinstance(name, str) and name for name in value):
        return None
    return "expected 'auto', a whole number of at least 1, or boundary names"


def device(value: Any) -> str | None:
    number = value.removeprefix("cuda:") if isinstance(value, str) else ""
    if value in ("auto", "cpu", "cuda") or (number.isascii() and number.isdigit() and len(number) < 4):
        return None
    return "expected auto | cpu | cuda | cuda:N"


def switch(value: Any) -> str | None:
    return None if isinstance(value, bool) else "expected true or false"


def text(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "expected a name"


def optional_text(value: Any) -> str | None:
    return None if value is None else text(value)


def path(value: Any) -> str | None:
    if value is None:
        return None
    try:
        name = os.fsencode(value)
    except (TypeError, ValueError):
        return "expected a path"
    short = len(name) <= _MOST_PATH and max(map(len, name.split(b"/"))) <= _MOST_NAME
    return None if isinstance(value, str | Path) and b"\0" not in name and short else "expected a path"


def names(value: Any) -> str | None:
    if value is None or (isinstance(value, tuple | list) and all(isinstance(name, str) and name for name in value)):
        return None
    return "expected names of tensors or layers"


def shares(value: Any) -> str | None:
    """Ascending numbers between 0 and 1, without either; or None."""
    expected = "expected ascending numbers above 0 and below 1, like 0.5,0.75"
    if value is None:
        return None
    if not isinstance(value, tuple | list) or not value:
        return expected
    inside = all(isinstance(x, int | float) and not isinstance(x, bool) and 0.0 < x < 1.0 for x in value)
    return None if inside and all(a < b for a, b in pairwise(value)) else expected


def class_weights(value: Any) -> str | None:
    if value is None or value == "balanced":
        return None
    if isinstance(value, tuple | list) and len(value) > 1:
        numbers = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in value)
        if numbers and all(x >= 0.0 for x in value) and any(value):
            return None
    return "expected 'balanced', or a number of at least 0 for each class, one above 0"


def function(*words: str, optional: bool = False) -> Check:
    def check(value: Any) -> str | None:
        if optional and value is None:
            return None
        named = isinstance(value, str) and (value in words or all(value.partition(":")))
        expected = ", ".join((*filter(None, words), "pkg.module:callable, or a callable"))
        return None if named or callable(value) else f"expected {expected}"

    return check


def augmentations(*known: str) -> Check:
    def check(value: Any) -> str | None:
        for one in () if value is None else value if isinstance(value, tuple | list) else (value,):
            if callable(one) or (isinstance(one, str) and (one in known or all(one.partition(":")))):
                continue
            near = difflib.get_close_matches(one[:_MOST_SHOWN], known, n=1) if isinstance(one, str) else []
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            return f"expected any of {', '.join(known)}{meant}, pkg.module:callable, or a callable, not {_brief(one)}"
        return None

    return check


def setting(default: Any, check: Check) -> Any:
    return field(default=default, metadata={"check": check})


class Checked:
    """Runs the check of every field; the subclasses are dataclasses made with `setting`."""

    def __post_init__(self) -> None:
        faults = [fault for f in fields(self) if (fault := fault_of(f, getattr(self, f.name)))]  # type: ignore[arg-type]
        if faults:
            raise ConfigError(faults, source=type(self).__name__)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]


def plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def fault_of(f: dataclasses.Field[Any], value: Any) -> str | None:
    reason = f.metadata["check"](value)
    return f"{f.name} = {_brief(plain(value))}: {reason}" if reason else None


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
