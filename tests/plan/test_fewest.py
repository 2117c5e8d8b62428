"""No plan has a micro-batch that a norm refuses, and what was asked for is refused before anything trains."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import BudgetInfeasibleError, ConfigError, DataError, PartitionError, TrglError
from ondevice_trgl.model.trace import Chain, trace
from ondevice_trgl.plan.estimate import estimate
from ondevice_trgl.plan.fewest import Fewest, check_norms
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.plan.planner import make_plan

GENEROUS, FLOOR = 10**12, 10**6


def blocks(*norms: nn.Module, classes: int = 3) -> Chain:
    """A convolution before each norm, on 4x4 images, one block pooled to 1x1 where its norm comes last."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()]
    for norm in norms:
        layers += [nn.Conv2d(8, 8, 3, padding=1), norm, nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), norms[-1].__class__(8), nn.Flatten(), nn.Linear(8, classes)]
    torch.manual_seed(0)
    return trace(nn.Sequential(*layers), torch.randn(2, 3, 4, 4))


class PlainNorm(nn.Identity):
    """None at all."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()


class Groups(nn.GroupNorm):
    """Each channel by itself: torch refuses one value a channel, in eval mode too."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)


def plan(chain: Chain, budget: int = GENEROUS, *, train_rows: int = 64, **settings: Any) -> Plan:
    config = TrainConfig(**{"batch_size": 8, **settings})
    costs = estimate(chain, config)
    return make_plan(
        chain, costs, config, budget_bytes=budget, floor_bytes=FLOOR, rows=train_rows, train_rows=train_rows
    )


@pytest.mark.parametrize("head", ["mlp", "mlp-sr", "conv"])
@pytest.mark.parametrize("norm", [PlainNorm, nn.BatchNorm2d, Groups])
def test_no_rung_at_any_budget_is_refused_by_a_norm(norm: Any, head: str) -> None:
    chain, seen = blocks(norm(8), norm(8)), set()
    config = TrainConfig(batch_size=8, head=head)
    costs, fewest = estimate(chain, config), Fewest(chain, config)
    with pytest.raises(BudgetInfeasibleError) as caught:
        plan(chain, FLOOR, head=head)
    least = caught.value.smallest_feasible_budget_bytes
    for budget in range(least, 2 * least, least // 50):
        made = make_plan(chain, costs, config, budget_bytes=budget, floor_bytes=FLOOR, rows=64, train_rows=64)
        for (a, b), ladder in zip(pairwise(made.bounds), made.ladders, strict=True):
            assert all(rung.micro_batch_size >= fewest(a, b) for rung in ladder)
            seen |= {rung.micro_batch_size for rung in ladder}
    assert min(seen) == (1 if (norm, head) in ((PlainNorm, "mlp"), (Groups, "mlp")) else 2)


def test_a_module_without_such_a_norm_may_go_further_down() -> None:
    chain = blocks(Groups(8), Groups(8))
    made = plan(chain, modules=2)
    assert [ladder[-1].micro_batch_size for ladder in made.ladders] == [1, 2]


REFUSED: list[tuple[dict[str, Any], type[TrglError], str]] = [
    ({"batch_size": 1}, ConfigError, r"batch_size = 1: 1\d \(BatchNorm2d at 1x1\).*fewer than 2 samples"),
    ({"micro_batch": 1}, ConfigError, r"micro_batch = 1: 1\d \(BatchNorm2d at 1x1\).*these have 1 sample"),
    ({"micro_batch": 1}, ConfigError, "--micro-batch auto"),
    ({"train_rows": 1}, DataError, "the train set has 1 sample: "),
    ({"batch_size": 9, "micro_batch": 3, "train_rows": 7}, ConfigError, r"these have 1 sample \(the most that divides"),
]


@pytest.mark.parametrize(("settings", "error", "message"), REFUSED)
def test_too_few_samples_are_refused_by_name(settings: dict[str, Any], error: type[TrglError], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(blocks(nn.BatchNorm2d(8), nn.BatchNorm2d(8)), **settings)


def test_norms_of_a_head_count_where_it_stands() -> None:
    """Only the boundaries in front of the pool to 1x1 can have a head that normalises."""
    chain = blocks(PlainNorm(), PlainNorm())
    with pytest.raises(ConfigError, match=r"of head 'mlp-sr' \(BatchNorm2d at 1x1\)"):
        plan(chain, head="mlp-sr", batch_size=1)
    assert plan(chain, head="mlp-sr", batch_size=1, modules=1).batch_size == 1
    assert plan(chain, batch_size=1).batch_size == 1


def test_gradients_of_micro_batches_are_not_those_of_the_batch_where_a_head_normalises() -> None:
    chain = blocks(PlainNorm(), PlainNorm())
    for head, exact in (("mlp", True), ("conv", False)):
        reasons = " ".join(plan(chain, head=head, micro_batch=2).reasons)
        assert ("BatchNorm then sees micro-batches" not in reasons) == exact


def test_a_refusal_for_want_of_memory_says_that_a_norm_is_in_the_way() -> None:
    chain = blocks(Groups(8), Groups(8))
    with pytest.raises(BudgetInfeasibleError, match=r"1x1\) cannot train on fewer than 2 samples at a time"):
        plan(chain, FLOOR + 1, modules=1)
    with pytest.raises(BudgetInfeasibleError, match="no micro-batches of one sample"):
        plan(blocks(nn.BatchNorm2d(8), nn.BatchNorm2d(8)), FLOOR + 1, batch_size=2, modules="auto")
    with pytest.raises(BudgetInfeasibleError) as caught:
        plan(blocks(PlainNorm(), PlainNorm()), FLOOR + 1)
    assert "samples at a time" not in str(caught.value)


def test_frozen_layers_do_not_ask_for_samples() -> None:
    """A module with nothing to train stays in eval mode."""
    chain = blocks(nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    last = len(chain.segments)
    config = TrainConfig()
    assert Fewest(chain, config)(last - 1, last) == 2
    chain.model.requires_grad_(False)
    assert Fewest(chain, config)(last - 1, last) == 1


def test_a_norm_that_no_number_of_samples_is_enough_for() -> None:
    pooled = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.InstanceNorm2d(8, track_running_stats=True), nn.Flatten()
    )
    with pytest.raises(PartitionError, match=r"does not accept .*more than 1 spatial element"):
        check_norms(trace(nn.Sequential(*pooled, nn.Linear(8, 3)), torch.randn(2, 3, 8, 8)))
