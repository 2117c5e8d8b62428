"""Plans whose last module is the network's own classifier, one more head behind the last of the asked modules."""

from functools import cache
from typing import Any

import pytest
import torch

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import PartitionError
from ondevice_trgl.model.trace import Chain, trace
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.plan.costs import Costs
from ondevice_trgl.plan.estimate import estimate
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.plan.planner import make_plan


@cache
def work() -> tuple[Chain, Costs]:
    torch.manual_seed(0)
    model = build_model("resnet-preact-4x16", num_classes=10, in_shape=(3, 16, 16))
    chain = trace(model, torch.randn(2, 3, 16, 16), apart=True)
    return chain, estimate(chain, TrainConfig())


def plan(**settings: Any) -> Plan:
    chain, costs = work()
    return make_plan(
        chain, costs, TrainConfig(**settings), budget_bytes=10**12, floor_bytes=10**8, rows=100, train_rows=80
    )


@pytest.mark.parametrize("count", [2, 3, 5])
def test_behind_as_many_modules_as_asked(count: int) -> None:
    chain, _ = work()
    made = plan(modules=count)
    assert (made.classifier, made.num_modules, made.num_parts) == (True, count, count + 1)
    assert made.bounds[-2:] == (chain.trunk, len(chain.segments))
    assert made.reasons[0] == f"{count} modules, as asked"
    assert "own classifier comes last" in made.reasons[1]
    assert f"{count} modules and the classifier" in made.summary()
    assert made.predicted_breakdowns[-2].head > 0, "the last module has a head as those before it"
    assert made.predicted_breakdowns[-1].head == 0


def test_as_few_as_fit_are_two_and_the_classifier() -> None:
    made = plan()
    assert (made.classifier, made.num_modules) == (True, 2)
    assert made.reasons[0].startswith("2 modules: the fewest")


def test_one_module_is_the_whole_network_end_to_end() -> None:
    made = plan(modules=1)
    assert (made.classifier, made.bounds) == (False, (0, len(work()[0].segments)))


def test_behind_named_layers_too() -> None:
    chain, _ = work()
    made = plan(modules=("blocks.1",))
    assert (made.classifier, made.num_modules) == (True, 2)
    last = chain.segments[chain.trunk - 1].ends[0]
    named = plan(modules=("blocks.1", last))
    assert named.bounds == made.bounds


def test_there_are_as_many_modules_as_the_trunk_has_segments() -> None:
    chain, _ = work()
    assert plan(modules=chain.trunk).num_modules == chain.trunk
    with pytest.raises(PartitionError, match=f"into 1 to {chain.trunk} modules"):
        plan(modules=chain.trunk + 1)


def test_a_plan_survives_json_and_one_from_before_has_no_classifier_apart() -> None:
    made = plan()
    assert Plan.from_dict(made.to_dict()) == made
    record = made.to_dict()
    del record["classifier"]
    assert Plan.from_dict(record).classifier is False
