"""Byte sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondevice_trgl.errors import SizeError, UsageError
from ondevice_trgl.units import format_size, parse_interval, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("2GiB", 2 * 2**30),
        ("600MB", 600 * 10**6),
        ("600 MiB", 600 * 2**20),
        ("0.5gb", 5 * 10**8),
        ("1.5GiB", 3 * 2**29),
        ("3k", 3000),
        ("3Ki", 3072),
        ("1_000", 1000),
        ("  64mb  ", 64 * 10**6),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("+7B", 7),
        (12345, 12345),
    ],
)
def test_parse_size(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2 XB", "two GB", "1..5GB", "1e9", "2GBs", "0x10", "2 GB 3"])
def test_unreadable_sizes_name_the_value_and_the_units(text: str) -> None:
    with pytest.raises(SizeError) as caught:
        parse_size(text, what="budget")
    assert f"budget {text!r} is not a byte size" in str(caught.value)
    assert "GiB" in caught.value.hint


@pytest.mark.parametrize("text", ["0", "0GB", "-1GB", "0.1B", 0, -5])
def test_sizes_must_be_positive(text: str | int) -> None:
    with pytest.raises(SizeError, match="must be more than zero bytes"):
        parse_size(text)


@pytest.mark.parametrize("flag", [True, False])
def test_truth_values_are_not_sizes(flag: bool) -> None:
    with pytest.raises(SizeError, match="is not a byte size"):
        parse_size(flag)


@given(st.integers(1, 10**15))
def test_bare_numbers_are_bytes(size: int) -> None:
    assert parse_size(str(size)) == parse_size(size) == parse_size(f"{size} B") == size


@given(st.integers(1, 10**6), st.sampled_from(["kb", "MB", "Gib", "TiB", "K", "mi"]))
def test_case_and_spaces_do_not_matter(count: int, unit: str) -> None:
    assert parse_size(f"{count}{unit}") == parse_size(f" {count}  {unit.upper()} ")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (10 * 2**20, "10 MiB"),
        (600_000_000, "572 MiB"),
        (2 * 2**30, "2.00 GiB"),
        (-(2**20), "-1.0 MiB"),
        (3.5 * 2**40, "3584.00 GiB"),
    ],
)
def test_format_size(size: float, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("text", "seconds", "steps"),
    [
        ("90s", 90.0, None),
        ("0.5 min", 30.0, None),
        ("2h", 7200.0, None),
        ("200steps", None, 200),
        (" 1 step ", None, 1),
    ],
)
def test_an_interval_is_of_time_or_of_steps(text: str, seconds: float | None, steps: int | None) -> None:
    assert parse_interval(text) == (seconds, steps)


@pytest.mark.parametrize("text", ["", "60", "0s", "0 steps", "1.5 steps", "-3s", "5 minutes", "s", "nan s"])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="200steps"):
        parse_interval(text)


@given(st.integers(1, 10**15))
def test_formatted_sizes_are_near_the_truth(size: int) -> None:
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.06)
