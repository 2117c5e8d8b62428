"""Objectives in bfloat16: near those in float32, the same with activations computed again, float32 at the ends."""

import pytest
import torch
from torch import Tensor

from ondevice_trgl.model.heads import head_behind
from ondevice_trgl.model.partition import group
from ondevice_trgl.model.trace import trace
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.trgl.step import Objective, tally_of


def objective(name: str, kind: str, dtype: torch.dtype | None, *, pieces: bool = False) -> Objective:
    torch.manual_seed(0)
    model = build_model(name, num_classes=3, in_shape=(1, 12, 12))
    chain = trace(model, torch.randn(2, 1, 12, 12))
    partition = group(chain, [0, len(chain.segments) - 1, len(chain.segments)])
    module = partition.modules[0]
    goal = Objective(
        module, head_behind(module, "mlp", 3), tau=0.1, transport=kind, transport_norm="mean", label_smoothing=0.1,
        pieces=partition.pieces(0) if pieces else (), autocast=dtype,
    )  # fmt: skip
    goal.train_mode(True)
    return goal


def gradients(goal: Objective) -> tuple[float, float, Tensor]:
    """Task loss, transport cost and all gradients in one."""
    z = torch.randn(6, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    tally = tally_of([goal.backward(z, torch.arange(6) % 3, 1.0)])
    found = [p.grad for p in goal.parameters().values()]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in found)
    return tally.task_loss, tally.transport_cost, torch.cat([grad.flatten() for grad in found if grad is not None])


@pytest.mark.parametrize("kind", ["branch", "displacement"])
@pytest.mark.parametrize("name", ["resnet-small", "resnet-preact-3x4"])
def test_a_step_in_bf16_is_near_that_in_fp32_and_the_same_when_computed_again(name: str, kind: str) -> None:
    task, cost, whole = gradients(objective(name, kind, None))
    half_task, half_cost, half = gradients(objective(name, kind, torch.bfloat16))
    assert half_task == pytest.approx(task, rel=0.05)
    assert half_cost == pytest.approx(cost, rel=0.05)
    assert half_task != task
    assert float(torch.nn.functional.cosine_similarity(whole, half, dim=0)) > 0.95
    again_task, again_cost, again = gradients(objective(name, kind, torch.bfloat16, pieces=True))
    assert again_task == pytest.approx(half_task, rel=1e-5)
    assert again_cost == pytest.approx(half_cost, rel=1e-4)
    assert float(torch.nn.functional.cosine_similarity(again, half, dim=0)) > 0.999


def test_what_is_handed_on_is_float32() -> None:
    goal = objective("resnet-small", "branch", torch.bfloat16)
    given: list[Tensor] = []
    z = torch.randn(4, 1, 12, 12)
    goal.train_mode(False)
    out, logits = goal.evaluate(z, 3)
    assert logits is not None
    assert out.dtype == logits.dtype == goal.evaluate(z, len(z))[0].dtype == torch.float32
    plain = objective("resnet-small", "branch", None)
    plain.train_mode(False)
    assert not torch.equal(out, plain.evaluate(z, 3)[0])
    goal.backward(z, torch.arange(4) % 3, 1.0, given.append)
    assert given[0].shape[0] == 4
