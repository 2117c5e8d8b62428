"""Budgets as people state them: sizes, and shares of the machine's memory."""

import pytest

from ondevice_trgl.errors import SizeError
from ondevice_trgl.policy import Policy, parse_budget


@pytest.mark.parametrize(
    ("text", "left", "total", "expected"),
    [
        ("free-RAM minus 500MB", 1_500_000_000, 4_000_000_000, 1_000_000_000),
        ("free RAM - 500MB", 1_500_000_000, 4_000_000_000, 1_000_000_000),
        ("FREE-ram", 1_500_000_000, 4_000_000_000, 1_500_000_000),
        ("50% of RAM", 1_500_000_000, 4_000_000_000, 2_000_000_000),
        ("80% of free RAM minus 200MB", 1_000_000_000, 4_000_000_000, 600_000_000),
        ("12.5% RAM", 0, 4_000_000_000, 500_000_000),
        ("RAM minus 1GiB", 0, 1 << 31, 1 << 30),
        ("free-RAM minus 500MB", 300_000_000, 4_000_000_000, 1),  # nothing is left: a budget that nothing fits
    ],
)
def test_policies(text: str, left: int, total: int, expected: int) -> None:
    policy = parse_budget(text)
    assert isinstance(policy, Policy)
    assert policy.bytes(left=left, total=total) == expected


@pytest.mark.parametrize(("stated", "expected"), [("600MB", 600_000_000), (512, 512), ("2 GiB", 1 << 31)])
def test_sizes_stay_sizes(stated: str | int, expected: int) -> None:
    assert parse_budget(stated) == expected


@pytest.mark.parametrize("text", ["free", "lots", "free-RAM minus", "0% of RAM", "120% of RAM", "RAM plus 1GB", "-1"])
def test_what_cannot_be_read_is_refused_with_both_ways_to_write_it(text: str) -> None:
    with pytest.raises(SizeError, match=r"600MB.*free-RAM minus 500MB") as caught:
        parse_budget(text, what="--budget")
    assert text in str(caught.value)


def test_what_is_subtracted_is_a_size() -> None:
    with pytest.raises(SizeError, match="lots"):
        parse_budget("free-RAM minus lots")
