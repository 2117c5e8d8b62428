"""Records made of JSON values: as their fields say, or refused by place."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from ondevice_trgl.typed import record_of, value_of


@dataclass(frozen=True)
class Inner:
    size: int
    share: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    parts: tuple[tuple[Inner, ...], ...]
    one: Inner | None = None
    either: str | int = "auto"
    pair: tuple[str, int] = ("a", 1)
    known: Mapping[str, int] = field(default_factory=dict)
    free: Any = None
    is_on: bool = False


GOOD: dict[str, Any] = {"name": "n", "parts": [[{"size": 1}], []]}


def test_what_fits() -> None:
    made = record_of(Outer, {**GOOD, "one": {"size": 2, "share": 1}, "pair": ["b", 2], "known": {"x": 3}, "free": [{}]})
    assert made == Outer("n", ((Inner(1),), ()), Inner(2, 1), "auto", ("b", 2), {"x": 3}, [{}])
    assert record_of(Outer, {**GOOD, "one": Inner(5), "either": 7}).one == Inner(5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": 5}, "name is 5, expected text"),
        ({"name": None}, "name is None, expected text"),
        ({"parts": {}}, "parts is {}, expected a list"),
        ({"parts": [[{"size": "1"}]]}, r"parts\[0\]\[0\]\.size is '1', expected a whole number"),
        ({"parts": [[{"size": True}]]}, "expected a whole number"),
        ({"parts": [[{"size": 1.0}]]}, "expected a whole number"),
        ({"parts": [[{}]]}, r"parts\[0\]\[0\]\.size is missing"),
        ({"parts": [[5]]}, r"parts\[0\]\[0\] is 5, expected an object"),
        ({"one": {"size": 1, "share": float("nan")}}, "one.share is nan, expected a number"),
        ({"one": {"size": 1, "share": True}}, "expected a number"),
        ({"either": None}, "either is None"),
        ({"pair": ["a"]}, "pair has 1 values, expected 2"),
        ({"known": {"x": "y"}}, "known.x is 'y'"),
        ({"known": [1]}, "known is .*, expected an object"),
        ({"is_on": 1}, "expected true or false"),
        ({"more": 1}, "more is not known"),
    ],
)
def test_what_does_not(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        record_of(Outer, {**GOOD, **changes})


def test_no_object_at_all_and_what_is_not_known() -> None:
    wrong: list[Any] = [[], None, 5, "x"]
    for values in wrong:
        with pytest.raises(ValueError, match="expected an object"):
            record_of(Outer, values)
    assert record_of(Outer, {**GOOD, "more": 1}, lenient=True) == record_of(Outer, GOOD)
    with pytest.raises(ValueError, match="name is") as caught:
        record_of(Outer, {**GOOD, "name": ["x" * 10**6]})
    assert len(str(caught.value)) < 200


def test_a_value_alone() -> None:
    assert value_of(Mapping[str, tuple[str, ...]], {"a": ["b"]}) == {"a": ("b",)}
    with pytest.raises(ValueError, match="expected a list"):
        value_of(Mapping[str, tuple[str, ...]], {"a": "b"})
