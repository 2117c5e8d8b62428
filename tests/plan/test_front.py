"""Plans for networks that are fine-tuned: the frozen front as few modules, without heads; norms that stay."""

import dataclasses
from typing import Any

import pytest
import torch

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import BudgetInfeasibleError
from ondevice_trgl.model.alike import likeness
from ondevice_trgl.model.blueprint import from_blueprint, to_blueprint
from ondevice_trgl.model.norms import norms_of
from ondevice_trgl.model.partition import LocalModule
from ondevice_trgl.model.trace import Chain, trace
from ondevice_trgl.model.tuning import tuned
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.plan.costs import Costs
from ondevice_trgl.plan.estimate import estimate
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.plan.planner import make_plan
from ondevice_trgl.plan.reasons import reasons_for

FLOOR = 10**8


def chain_for(**settings: Any) -> Chain:
    torch.manual_seed(0)
    config = TrainConfig(**settings)
    model = build_model("resnet-preact-6x16", num_classes=10, in_shape=(3, 32, 32))
    return tuned(trace(model, torch.randn(2, 3, 32, 32), apart=True, freeze_norms=config.freeze_norms), config)


@pytest.fixture(scope="module")
def frozen() -> tuple[Chain, Costs, TrainConfig]:
    settings: dict[str, Any] = {"freeze_until": "blocks.3"}
    chain = chain_for(**settings)
    return chain, estimate(chain, TrainConfig()), TrainConfig(**settings)


def plan(work: tuple[Chain, Costs, TrainConfig], budget: int) -> Plan:
    chain, costs, config = work
    return make_plan(chain, costs, config, budget_bytes=budget, floor_bytes=FLOOR, rows=100, train_rows=80)


def test_the_front_is_one_module_where_that_fits_and_several_where_it_does_not(
    frozen: tuple[Chain, Costs, TrainConfig],
) -> None:
    chain, costs, _ = frozen
    roomy = plan(frozen, 10**12)
    assert roomy.bounds == (0, chain.prefix, chain.trunk, len(chain.segments))
    assert (roomy.passed, roomy.num_modules) == (1, 2)
    assert roomy.rungs[0].peak_bytes < roomy.rungs[1].peak_bytes
    assert costs.heads[: chain.prefix] == (None,) * chain.prefix
    assert roomy.reasons[0].startswith("1 module: the fewest that fit")
    assert "the frozen front is one module" in roomy.reasons[1]
    with pytest.raises(BudgetInfeasibleError) as caught:
        plan(frozen, FLOOR)
    least = plan(frozen, caught.value.smallest_feasible_budget_bytes)
    assert least.passed >= 1
    assert all(not rung.checkpointed for ladder in least.ladders[: least.passed] for rung in ladder)


def test_a_front_of_large_weights_is_cut(frozen: tuple[Chain, Costs, TrainConfig]) -> None:
    """Its segments pretend to hold 100 MB each: four fit nowhere, two do."""
    chain, costs, config = frozen
    heavy = [dataclasses.replace(one, buffers=100_000_000) for one in costs.segments[: chain.prefix]]
    costs = dataclasses.replace(costs, segments=(*heavy, *costs.segments[chain.prefix :]))
    made = plan((chain, costs, config), FLOOR + 350_000_000)
    assert made.passed > 1
    assert made.bounds[made.passed] == chain.prefix
    assert f"the frozen front is {made.passed} modules" in "".join(made.reasons)
    assert max(made.predicted_peak_bytes) <= made.budget_bytes


def test_samples_in_the_front_at_a_time_are_nobodys_micro_batch(frozen: tuple[Chain, Costs, TrainConfig]) -> None:
    made = plan(frozen, 10**12)
    small = dataclasses.replace(made.ladders[0][-1], micro_batch_size=2)
    changed = dataclasses.replace(made, ladders=((small,), *made.ladders[1:]))
    again = reasons_for(changed, frozen[2], 80, exact=False)
    assert (again.micro_batch_size, again.grad_accum_steps) == (made.batch_size, 1)
    assert not [reason for reason in again.reasons if "accumulated" in reason]


def test_frozen_norms_neither_mix_samples_nor_pass_for_others() -> None:
    free, kept = chain_for(), chain_for(freeze_norms=True)
    assert any(norm.mixes for norms in norms_of(free) for norm in norms)
    assert not any(norms_of(kept))
    assert not any(norm.mixes for norms in norms_of(chain_for(train="last")) for norm in norms)
    blocks = [LocalModule.of(chain, 1, 2) for chain in (free, kept)]
    assert likeness(blocks[0]) != likeness(blocks[1])


def test_the_cost_of_a_branch_behind_a_frozen_norm_is_that_of_its_values() -> None:
    """gamma^2 + beta^2 is what a norm puts out in train mode alone."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = torch.nn.Conv2d(1, 4, 1), torch.nn.Conv2d(4, 4, 1)
            self.norm, self.fc = torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> Any:
            x = self.stem(x)
            return self.fc((x + self.norm(self.conv(x))).mean((2, 3)))

    for freeze, closed in ((False, True), (True, False)):
        chain = trace(Net(), torch.randn(2, 1, 4, 4), freeze_norms=freeze)
        (branch,) = LocalModule.of(chain, 0, len(chain.segments)).branches
        assert (branch.norm is not None) is closed


def test_a_blueprint_remembers_what_is_frozen() -> None:
    chain = chain_for(freeze_until="blocks.1", freeze_norms=True, train="norm")
    again = from_blueprint(to_blueprint(chain))
    assert again.prefix == chain.prefix > 0
    for one, other in ((LocalModule.of(c, 0, c.prefix), LocalModule.of(c, c.prefix, c.trunk)) for c in (chain, again)):
        assert one.passed
        assert not other.passed
        trained = {name.rpartition(".")[2] for name, p in other.named_parameters() if p.requires_grad}
        assert trained == {"weight", "bias"}
        assert all(p.ndim == 1 for p in other.parameters() if p.requires_grad)
        other.train()
        assert not any(layer.training for layer in other.modules() if isinstance(layer, torch.nn.BatchNorm2d))
