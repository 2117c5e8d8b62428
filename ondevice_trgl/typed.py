"""Records made of JSON values, every value checked against the type that its field has."""

import dataclasses
import functools
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}


def record_of(cls: type[T], values: Any, *, lenient: bool = False) -> T:
    """The dataclass `cls` of the JSON object `values`; lists become tuples, objects inside become records.

    Raises ValueError with the place of what is missing, of another type, unknown (left out with `lenient`), or no
    finite number. What is a record already, and what is Any, is taken as it is.
    """
    made: T = _record(cls, values, "", lenient)
    return made


def value_of(hint: Any, values: Any, at: str = "it") -> Any:
    """`values`, which are called `at`, as the type `hint`; see `record_of`. Raises ValueError."""
    return _value(hint, values, at, False)


@functools.cache
def _fields(cls: type) -> tuple[dict[str, Any], frozenset[str]]:
    """Types of the fields, by name, and which have to be given."""
    known = dataclasses.fields(cls)
    hints = typing.get_type_hints(cls)
    needed = {f.name for f in known if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    return {f.name: hints[f.name] for f in known}, frozenset(needed)


def _record(cls: type, values: Any, at: str, lenient: bool) -> Any:
    if not isinstance(values, Mapping):
        raise _wrong(at or cls.__name__, values, "an object")
    hints, needed = _fields(cls)
    if not lenient and (unknown := [name for name in values if name not in hints]):
        raise ValueError(f"{_inside(at, str(unknown[0])[:60])} is not known")
    if missing := sorted(needed - values.keys()):
        raise ValueError(f"{_inside(at, missing[0])} is missing")
    return cls(**{n: _value(hint, values[n], _inside(at, n), lenient) for n, hint in hints.items() if n in values})


def _value(hint: Any, value: Any, at: str, lenient: bool) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _any_of(args, value, at, lenient)
    if origin is tuple:
        return _tuple(args, value, at, lenient)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise _wrong(at, value, "an object")
        return {name: _value(args[1], inside, _inside(at, name[:60]), lenient) for name, inside in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else _record(hint, value, at, lenient)
    fits = type(value) in (int, float) and math.isfinite(value) if hint is float else type(value) is hint
    if not fits:
        raise _wrong(at, value, _EXPECTED[hint])
    return value


def _any_of(hints: tuple[Any, ...], value: Any, at: str, lenient: bool) -> Any:
    if value is None and types.NoneType in hints:
        return None
    wanted = [hint for hint in hints if hint is not types.NoneType]
    for hint in wanted[:-1]:
        try:
            return _value(hint, value, at, lenient)
        except ValueError:
            continue
    return _value(wanted[-1], value, at, lenient)


def _tuple(hints: tuple[Any, ...], value: Any, at: str, lenient: bool) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(at, value, "a list")
    if hints[-1] is not Ellipsis:
        if len(value) != len(hints):
            raise ValueError(f"{at} has {len(value)} values, expected {len(hints)}")
        pairs = zip(hints, value, strict=True)
    else:
        pairs = ((hints[0], one) for one in value)  # type: ignore[assignment]
    return tuple(_value(hint, one, f"{at}[{k}]", lenient) for k, (hint, one) in enumerate(pairs))


def _inside(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name


def _wrong(at: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{at} is {reprlib.repr(value)}, expected {expected}")
