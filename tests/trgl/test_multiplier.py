"""The multiplier variant: lambda <- lambda + h L every s steps, and the weight that it gives the transport cost."""

import pytest
import torch

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import NonFiniteError
from ondevice_trgl.trgl.multiplier import Multiplier
from ondevice_trgl.trgl.step import Objective
from tests.trgl.test_step import batch, first_module, objective


def test_it_moves_by_the_loss_of_every_so_many_steps_alone() -> None:
    multiplier = Multiplier.of(TrainConfig(tau="multiplier", multiplier_start=2.0, multiplier_every=3))
    assert multiplier is not None
    for step, loss in enumerate((0.5, 0.25, 4.0, 8.0, 16.0, 1.5), start=1):
        multiplier.after(step, loss)
    assert multiplier.value == 2.0 + 4.0 + 1.5
    assert multiplier.weight == 1.0 / 7.5


def test_it_is_there_where_it_was_asked_for_and_goes_on_where_it_stood() -> None:
    assert Multiplier.of(TrainConfig()) is None
    assert Multiplier.of(TrainConfig(tau="off")) is None
    assert Multiplier.of(TrainConfig(tau="multiplier")) == Multiplier(1.0, 1.0, 50)
    assert Multiplier.of(TrainConfig(tau="multiplier", multiplier_rate=0.1), 3.5) == Multiplier(3.5, 0.1, 50)


def test_a_negative_loss_that_would_turn_it_round_is_refused_with_the_value_as_it_was() -> None:
    multiplier = Multiplier(1.0, 2.0, 1)
    with pytest.raises(NonFiniteError, match=r"the multiplier would be -1: the task loss is -1"):
        multiplier.after(1, -1.0)
    assert multiplier.value == 1.0


def test_the_objective_weighs_transport_by_what_it_is_at_each_step() -> None:
    multiplier = Multiplier(4.0, 1.0, 1)
    goals = {
        weight: Objective(
            first_module(),
            objective(first_module()).head,
            tau=None if weight is None else 0.5 / weight,
            transport="branch",
            transport_norm="mean",
            label_smoothing=0.1,
            multiplier=multiplier if weight is None else None,
        )
        for weight in (None, 0.25, 0.125)
    }
    found = {}
    for weight in (0.25, 0.125):
        for key in (None, weight):
            goals[key].backward(*batch(), 1.0)
            found[key] = [parameter.grad for parameter in goals[key].parameters().values()]
            for parameter in goals[key].parameters().values():
                parameter.grad = None
        for mine, theirs in zip(found[None], found[weight], strict=True):
            assert mine is not None
            assert theirs is not None
            assert torch.allclose(mine, theirs, atol=1e-7)
        multiplier.after(1, 4.0)
    assert any(not torch.equal(a, b) for a, b in zip(found[0.25], found[0.125], strict=True) if a is not None)  # type: ignore[arg-type]
