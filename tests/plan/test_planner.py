"""The plan: fewest modules first, smaller micro-batches only when needed, and refusals that tell the way out."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.limit import CODE_BYTES
from ondevice_trgl.errors import BudgetInfeasibleError, PartitionError, UsageError
from ondevice_trgl.model.trace import Chain, trace
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.plan.costs import Costs
from ondevice_trgl.plan.estimate import estimate
from ondevice_trgl.plan.plan import Level, Plan
from ondevice_trgl.plan.planner import make_plan
from ondevice_trgl.plan.predict import Rehearsed

FLOOR, ROWS, TRAIN_ROWS = 200_000_000, 1000, 800
GENEROUS = 10**12


@cache
def work(head: str = "mlp", optimizer: str = "sgd") -> tuple[Chain, Costs]:
    torch.manual_seed(0)
    model = build_model("resnet-preact-6x16", num_classes=10, in_shape=(3, 32, 32))
    chain = trace(model, torch.randn(2, 3, 32, 32))
    return chain, estimate(chain, TrainConfig(head=head, optimizer=optimizer))


def plan(budget: int, *, train_rows: int = TRAIN_ROWS, floor: int = FLOOR, **settings: Any) -> Plan:
    config = TrainConfig(**settings)
    chain, costs = work(config.head, config.optimizer)
    return make_plan(chain, costs, config, budget_bytes=budget, floor_bytes=floor, rows=ROWS, train_rows=train_rows)


FIRST = [
    (32, False),
    (32, True),
    (16, False),
    (8, False),
    (4, False),
    (16, True),
    (8, True),
    (4, True),
    (2, False),
    (2, True),
]
ORDER = [Level(*way, spilled) for spilled in (False, True) for way in FIRST]
"""What is preferred with BatchNorm in the network: (micro-batch, checkpointed), and only then the same on disk."""


def rank(made: Plan) -> int:
    """Place in `ORDER` of the module that is furthest down."""
    return max(ORDER.index(rung.level) for rung in made.rungs)


def rank_within(budget: int, **settings: Any) -> int:
    """Rank of the plan for `budget`; one below all others where there is none."""
    try:
        return rank(plan(budget, **settings))
    except BudgetInfeasibleError:
        return len(ORDER)


def refusal(budget: int, **settings: Any) -> BudgetInfeasibleError:
    with pytest.raises(BudgetInfeasibleError) as caught:
        plan(budget, **settings)
    return caught.value


def test_a_generous_budget_gives_two_modules_at_the_full_batch_and_says_that_end_to_end_fits() -> None:
    made = plan(GENEROUS)
    assert (made.num_modules, made.micro_batch_size, made.grad_accum_steps) == (2, 32, 1)
    assert any("end-to-end would fit" in reason for reason in made.reasons)
    assert made.end_to_end_bytes > made.peak_bytes


def test_shrinking_budgets_first_take_more_modules_then_checkpointing_then_smaller_micro_batches() -> None:
    seen: list[tuple[int, int]] = []
    budget = plan(GENEROUS).peak_bytes
    while True:
        try:
            made = plan(budget)
        except BudgetInfeasibleError:
            break
        assert made.peak_bytes <= budget
        seen.append((rank(made), made.num_modules))
        budget = made.peak_bytes - 1
    assert seen == sorted(seen)
    assert (0, 7) in seen  # every number of modules is tried before anything else
    assert any(place == 2 for place, _ in seen)


@settings(max_examples=40)
@given(budget=st.integers(200_000_000, 300_000_000))
def test_no_plan_exceeds_its_budget_and_none_has_a_simpler_one_within(budget: int) -> None:
    needed = refusal(1).smallest_feasible_budget_bytes
    if budget < needed:  # what is named has some room to spare
        assert rank_within(budget) < len(ORDER) or refusal(budget).smallest_feasible_budget_bytes == needed
        return
    made = plan(budget)
    assert made.peak_bytes <= budget
    assert made.batch_size == made.micro_batch_size * made.grad_accum_steps == 32
    for count in range(2, made.num_modules):
        assert rank_within(budget, modules=count) > rank(made)
    if rank(made):
        assert rank_within(budget, modules=7) >= rank(made)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modules": 1},
        {"modules": 3},
        {"modules": 2, "micro_batch": 32},
        {"micro_batch": 4},
        {"modules": ("blocks.1", "blocks.3")},
        {"cache": "memory"},
        {"optimizer": "adamw", "head": "mlp-sr"},
    ],
    ids=str,
)
def test_the_smallest_feasible_budget_given_back_works_and_is_near_the_smallest(settings: dict[str, Any]) -> None:
    error = refusal(1, **settings)
    assert error.budget_bytes == 1
    needed = error.smallest_feasible_budget_bytes
    assert plan(needed, **settings).peak_bytes <= needed
    assert f"{needed // 1_000_000}MB" in error.hint
    assert needed % 1_000_000 == 0
    assert refusal(FLOOR + 8 * (needed - FLOOR) // 10, **settings).smallest_feasible_budget_bytes == needed


def test_a_budget_below_the_floor_says_so() -> None:
    assert "the floor alone is above it" in refusal(FLOOR - 1).message
    assert "the floor alone" not in refusal(FLOOR + 1).message


def test_a_refusal_names_the_module_the_bytes_and_the_flags_that_lower_them() -> None:
    error = refusal(FLOOR, modules=2, micro_batch=32, optimizer="adamw", head="conv")
    for word in ("module 1", "at micro-batch 32, checkpointed", "is the floor"):
        assert word in error.message
    for way in ("--modules auto", "--micro-batch auto", "--optimizer sgd", "--head pooled-linear", "--image-size"):
        assert way in error.hint
    assert "--modules auto" not in refusal(FLOOR).hint


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_a_number_of_modules_is_kept(count: int) -> None:
    made = plan(GENEROUS, modules=count)
    assert made.num_modules == count
    assert ("1 module, as asked" if count == 1 else f"{count} modules, as asked") in made.reasons


def test_a_number_of_modules_is_balanced_by_peak() -> None:
    chain, _ = work()
    peaks = plan(GENEROUS, modules=3).peak_bytes
    names = [segment.ends[0] for segment in chain.segments[:-1]]
    every = [plan(GENEROUS, modules=(a, b)).peak_bytes for i, a in enumerate(names) for b in names[i + 1 :]]
    assert peaks == min(every)


def test_named_boundaries_are_kept_whatever_the_budget() -> None:
    chain, _ = work()
    tight = refusal(1, modules=("blocks.1", "blocks.3")).smallest_feasible_budget_bytes
    made = plan(tight, modules=("blocks.1", "blocks.3"))
    ends = [chain.segments[bound - 1].ends[0] for bound in made.bounds[1:-1]]
    assert ends == ["blocks.1", "blocks.3"]


@pytest.mark.parametrize(("settings", "message"), [({"modules": 8}, "1 to 7"), ({"modules": ("block.1",)}, "blocks.1")])
def test_modules_that_cannot_be_had_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        plan(GENEROUS, **settings)


@pytest.mark.parametrize("micro", [1, 8, 32])
def test_a_micro_batch_is_kept(micro: int) -> None:
    made = plan(GENEROUS, micro_batch=micro)
    assert (made.micro_batch_size, made.grad_accum_steps) == (micro, 32 // micro)


@pytest.mark.parametrize(("train_rows", "micro"), [(20, 16), (7, 2), (1, 32), (800, 8)])
def test_few_samples_make_a_smaller_batch_that_the_micro_batch_divides(train_rows: int, micro: int) -> None:
    made = plan(GENEROUS, train_rows=train_rows, micro_batch=micro)
    assert made.batch_size == min(32, train_rows)
    assert made.batch_size % made.micro_batch_size == 0
    assert made.micro_batch_size <= micro
    assert any("training samples" in reason for reason in made.reasons) == (train_rows < 32)


def test_the_memory_tier_counts_in_the_budget_and_the_disk_tier_does_not() -> None:
    disk, memory = plan(GENEROUS), plan(GENEROUS, cache="memory")
    row = 16 * 32 * 32 * 4
    assert disk.cache_tier == "disk"
    assert memory.peak_bytes - disk.peak_bytes == 2 * ROWS * row
    assert plan(GENEROUS, cache="memory", cache_dtype="bf16").peak_bytes - disk.peak_bytes == ROWS * row


def test_a_disk_that_is_ram_counts_as_memory_does_and_not_where_memory_is_pinned_beside_a_gpu() -> None:
    chain, costs = work()

    def made(cache: str, **settings: Any) -> tuple[str, int]:
        config = TrainConfig(modules=2, cache=cache)
        found = make_plan(
            chain, costs, config, budget_bytes=GENEROUS, floor_bytes=FLOOR, rows=ROWS, train_rows=TRAIN_ROWS, **settings
        )
        return found.cache_tier, max(found.predicted_peak_bytes)

    disk, memory = made("disk")[1], made("memory")[1]
    assert made("disk", disk_is_ram=True) == ("disk", memory)
    assert memory > disk
    assert made("memory", pinned_bytes=0) == ("memory", disk)
    assert made("auto", pinned_bytes=10**12) == ("memory", disk)
    assert made("auto", pinned_bytes=1000) == made("auto") == ("disk", disk)


def test_cache_bytes_are_the_two_boundaries_that_stand_at_one_time() -> None:
    row = 16 * 32 * 32 * 4
    assert plan(GENEROUS, modules=1).cache_bytes == 0
    assert plan(GENEROUS, modules=2).cache_bytes == ROWS * row
    assert plan(GENEROUS, modules=3).cache_bytes == 2 * ROWS * row
    assert plan(GENEROUS, modules=3, cache_dtype="fp16").cache_bytes == ROWS * row


def test_a_cache_limit_that_no_plan_keeps_is_refused_with_the_least_bytes() -> None:
    with pytest.raises(UsageError, match="caches 16 MiB or more on disk") as caught:
        plan(GENEROUS, cache_limit="1MB")
    assert "--cache-limit" in caught.value.hint
    assert "whatever the budget" in caught.value.message


def test_a_budget_in_which_only_what_the_cache_has_no_room_for_fits_is_refused_with_one_that_works() -> None:
    two: dict[str, Any] = {"cache_limit": 70_000_000, "cache_dtype": "fp32"}  # one boundary, of two modules
    budget = plan(GENEROUS, **two).peak_bytes - 20_000_000
    assert plan(budget, cache_dtype="fp32", micro_batch=32).num_modules > 2
    refused = refusal(budget, micro_batch=32, **two)
    assert "every plan within the budget caches 125 MiB or more on disk, the limit is 67 MiB" in refused.message
    assert "a larger --cache-limit" in refused.hint
    assert refused.smallest_feasible_budget_bytes > budget
    enough = plan(refused.smallest_feasible_budget_bytes, micro_batch=32, **two)
    assert (enough.num_modules, enough.cache_bytes <= 70_000_000) == (2, True)
    wholly = refusal(FLOOR, micro_batch=32, **two)
    assert "every plan" not in wholly.message
    assert plan(wholly.smallest_feasible_budget_bytes, micro_batch=32, **two).cache_bytes <= 70_000_000
    without = refusal(FLOOR, micro_batch=32, cache_dtype="fp32").smallest_feasible_budget_bytes
    assert wholly.smallest_feasible_budget_bytes > without


def test_the_floor_is_part_of_every_peak() -> None:
    low, high = plan(GENEROUS, floor=0), plan(GENEROUS, floor=FLOOR)
    assert [b - a for a, b in zip(low.predicted_peak_bytes, high.predicted_peak_bytes, strict=True)] == [FLOOR, FLOOR]


def test_a_plan_survives_json() -> None:
    made = plan(FLOOR + 60_000_000)
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert f"{made.num_modules} modules" in made.summary()


def learned(above: dict[tuple[int, int, Level], Rehearsed], **settings: Any) -> Plan:
    chain, costs = work()
    return make_plan(
        chain,
        costs,
        TrainConfig(**{"modules": 2, **settings}),
        budget_bytes=GENEROUS,
        floor_bytes=FLOOR,
        rows=ROWS,
        train_rows=TRAIN_ROWS,
        measured=above,
        pareto=True,
    )


def test_what_was_rehearsed_is_what_is_predicted_and_others_of_its_size_exceed_their_estimate_alike() -> None:
    before = learned({})
    start, stop, micro = *before.bounds[:2], before.batch_size
    above = 2 * (before.predicted_peak_bytes[0] - FLOOR)
    for is_direct in (True, False):
        after = learned({(start, stop, Level(micro, False)): Rehearsed(above, is_direct)})
        assert after.bounds == before.bounds
        assert after.predicted_peak_bytes[0] == FLOOR + above
        assert after.predicted_peak_bytes[1] > 1.5 * (before.predicted_peak_bytes[1] - FLOOR) + FLOOR
        assert after.ladders[0][0].measured == is_direct


def test_weights_have_nothing_taken_beside_them() -> None:
    chain = trace(nn.Sequential(nn.Linear(50, 3000), nn.Linear(3000, 3000), nn.Linear(3000, 10)), torch.randn(2, 50))
    costs = estimate(chain, TrainConfig())
    with pytest.raises(BudgetInfeasibleError) as caught:
        make_plan(chain, costs, TrainConfig(), budget_bytes=1, floor_bytes=0, rows=ROWS, train_rows=TRAIN_ROWS)
    two = 2 * 4 * 3000 * 3001  # weights and a gradient, which goes to disk; the optimizer's state is there
    assert two + CODE_BYTES < caught.value.smallest_feasible_budget_bytes < 1.03 * two + CODE_BYTES
    enough = make_plan(chain, costs, TrainConfig(), budget_bytes=10**9, floor_bytes=0, rows=ROWS, train_rows=TRAIN_ROWS)
    whole, spilled = (
        next(rung.peak_bytes for rung in ladder if rung.spilled is there)
        for there in (False, True)
        for ladder in [max(enough.ladders, key=lambda ladder: ladder[0].peak_bytes)]
    )
    assert 0.95 * two / 2 < whole - spilled < 1.05 * two / 2


@pytest.mark.parametrize("settings", [{}, {"cache": "memory"}, {"optimizer": "adamw", "modules": 2}], ids=str)
@pytest.mark.parametrize("budget", [GENEROUS, FLOOR + 70_000_000])
def test_the_bytes_of_every_rung_are_accounted_for(budget: int, settings: dict[str, Any]) -> None:
    try:
        made = plan(budget, **settings)
    except BudgetInfeasibleError as refused:
        made = plan(refused.smallest_feasible_budget_bytes, **settings)
    for ladder, breakdowns in zip(made.ladders, made.breakdowns, strict=True):
        assert [rung.peak_bytes for rung in ladder] == [one.total for one in breakdowns]
        assert all(min(vars(one).values()) >= 0 and one.floor == FLOOR for one in breakdowns)
    assert [one.total for one in made.predicted_breakdowns] == list(made.predicted_peak_bytes)
    assert all(one.head > 0 for one in made.predicted_breakdowns[:-1])
    assert made.predicted_breakdowns[-1].head == 0
    whole = plan(GENEROUS, **{**settings, "modules": 1}).predicted_breakdowns[0]
    chain, _ = work(optimizer=str(settings.get("optimizer", "sgd")))
    parameters = 4 * sum(p.numel() for p in chain.model.parameters())
    assert whole.weights >= parameters
    assert whole.optimizer == parameters * (2 if settings.get("optimizer") == "adamw" else 1)
    assert 0 <= whole.gradients <= parameters


def test_the_bytes_of_a_plan_from_before_they_were_kept_are_not_known() -> None:
    record = plan(GENEROUS).to_dict()
    del record["breakdowns"]
    assert Plan.from_dict(record).predicted_breakdowns == ()


def test_a_measured_peak_below_its_tensors_is_accounted_for_too() -> None:
    before = learned({})
    start, stop = before.bounds[:2]
    rehearsed = Rehearsed(before.predicted_breakdowns[0].activations // 2)
    after = learned({(start, stop, Level(before.batch_size, False)): rehearsed})
    assert after.predicted_breakdowns[0].total == FLOOR + rehearsed.above_bytes
    assert after.predicted_breakdowns[0].scratch == 0
