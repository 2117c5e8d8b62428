"""What may be taken: what was stated, asked anew, and never more than the container's limit."""

from collections.abc import Iterator

import pytest

from ondevice_trgl.device.allowance import Allowance
from ondevice_trgl.errors import BudgetInfeasibleError, SizeError
from ondevice_trgl.policy import Stated

MB = 1_000_000


def allowance(stated: Stated, *, limit: int | None = None, left: int = 0, total: int = 0) -> Allowance:
    return Allowance(stated, limit=lambda: limit, left=lambda: left, total=lambda: total)


@pytest.mark.parametrize(
    ("stated", "limit", "expected"),
    [("600MB", None, 600 * MB), ("600MB", 900 * MB, 600 * MB), ("2GB", 512 * MB, 512 * MB), (700 * MB, None, 700 * MB)],
)
def test_the_smaller_of_the_budget_and_the_containers_limit_counts(
    stated: Stated, limit: int | None, expected: int
) -> None:
    assert allowance(stated, limit=limit).now() == expected


def test_a_limit_that_is_the_budget_but_for_part_of_a_page_is_the_budget() -> None:
    assert allowance("350MB", limit=350 * MB - 896).now() == 350 * MB
    assert allowance("350MB", limit=350 * MB - 896).why() == ""


def test_a_policy_follows_what_is_left_in_steps_of_a_sixty_fourth() -> None:
    left = [1_500 * MB]
    policy = Allowance("free-RAM minus 500MB", limit=lambda: None, left=lambda: left[0], total=lambda: 4_000 * MB)
    first = policy.now()
    assert 984 * MB <= first <= 1_000 * MB
    left[0] -= 1 * MB
    assert policy.now() == pytest.approx(first, rel=1 / 60)
    left[0] = 900 * MB
    assert 393 * MB <= policy.now() <= 400 * MB
    assert "free-RAM minus 500MB" in policy.why()
    assert policy.text == "free-RAM minus 500MB"


def test_a_function_is_asked_each_time() -> None:
    answers: Iterator[str | int] = iter(["600MB", 300 * MB, "50% of RAM", "nonsense"])
    asked = Allowance(lambda: next(answers), limit=lambda: 550 * MB, left=lambda: 0, total=lambda: 400 * MB)
    assert asked.text == ""
    assert asked.now() == 550 * MB
    assert asked.now() == 300 * MB
    assert asked.now() == pytest.approx(200 * MB, rel=1 / 60)
    with pytest.raises(SizeError, match="nonsense"):
        asked.now()


def test_both_numbers_are_named() -> None:
    assert "512 MiB" not in allowance("600MB").why()
    why = allowance("2GiB", limit=512 << 20).why()
    assert "512 MiB" in why
    assert "2.00 GiB" in why


def test_a_refusal_names_the_containers_limit_where_that_is_in_the_way() -> None:
    error = BudgetInfeasibleError("nothing fits", budget_bytes=1, smallest_feasible_budget_bytes=700 * MB, hint="700MB")
    refused = allowance("2GB", limit=512 << 20).refused(error)
    assert "limited to 512 MiB" in str(refused)
    assert "budget of 2GB" in str(refused)
    assert "700MB" in refused.hint
    assert refused.smallest_feasible_budget_bytes == 700 * MB
    assert allowance("600MB", limit=None).refused(error) is error
    assert allowance("600MB", limit=900 * MB).refused(error) is error
