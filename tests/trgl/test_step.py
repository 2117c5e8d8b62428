"""One update of one module: objective, accumulation, and refusal of a loss that is not finite."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ondevice_trgl.errors import NonFiniteError
from ondevice_trgl.model.heads import head_behind
from ondevice_trgl.model.partition import LocalModule, partition
from ondevice_trgl.model.store import state_of
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.trgl.step import Objective, Tally, tally_of, train_step


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]


def first_module() -> LocalModule:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 3))
    return partition(model, torch.randn(2, 6), 2).modules[0]


def objective(module: LocalModule, tau: float | None = 0.2, norm: str = "mean") -> Objective:
    torch.manual_seed(1)
    head = head_behind(module, "mlp", 3)
    return Objective(module, head, tau=tau, transport="branch", transport_norm=norm, label_smoothing=0.1)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(12, 6, generator=generator), torch.randint(0, 3, (12,), generator=generator)


@pytest.mark.parametrize("norm", ["mean", "sum"])
def test_loss_is_cross_entropy_plus_transport_over_two_tau(norm: str) -> None:
    module = first_module()
    goal = objective(module, norm=norm)
    z, labels = batch()
    tally = tally_of([goal.backward(z, labels, 1.0)])
    got = {name: p.grad for name, p in goal.parameters().items()}
    for parameter in goal.parameters().values():
        parameter.grad = None
    cost, x = torch.zeros(()), z
    parameters = state_of(module)
    for block in sorted({name.split(".")[0] for name in parameters}):
        weights = [parameters[f"{block}.{name}"] for name in ("a.weight", "a.bias", "b.weight", "b.bias")]
        r = functional.linear(torch.tanh(functional.linear(x, *weights[:2])), *weights[2:])
        cost = cost + r.square().mean() * (6 if norm == "sum" else 1)
        x = x + r
    assert goal.head is not None
    task = functional.cross_entropy(goal.head(x), labels, label_smoothing=0.1)
    (task + cost / (2 * 0.2)).backward()
    assert tally.mean_task_loss() == pytest.approx(task.item(), rel=1e-5)
    assert tally.transport_cost / tally.samples == pytest.approx(cost.item(), rel=1e-5)
    for name, parameter in goal.parameters().items():
        assert got[name] is not None
        assert parameter.grad is not None
        assert torch.allclose(got[name], parameter.grad, atol=1e-6), name  # type: ignore[arg-type]


def test_without_tau_there_is_no_transport() -> None:
    tally = tally_of([objective(first_module(), tau=None).backward(*batch(), 1.0)])
    assert tally.transport_cost == 0.0


@pytest.mark.parametrize("micro", [1, 2, 3, 6, 12])
def test_equal_micro_batches_accumulate_to_the_full_batch(micro: int) -> None:
    z, labels = batch()
    results = []
    for size in (12, micro):
        goal = objective(first_module())
        optimizer = Optimizer("sgd", goal.parameters(), momentum=0.9, weight_decay=1e-3)
        tallies = []
        for _ in range(3):
            pieces = [(z[i : i + size], labels[i : i + size]) for i in range(0, 12, size)]
            tallies.append(train_step(goal, optimizer, pieces, 12 // size, 0.1))
        results.append((tallies, [p.detach().clone() for p in goal.parameters().values()]))
    for full, part in zip(results[0][0], results[1][0], strict=True):
        assert part.samples == full.samples == 12
        assert part.correct == full.correct
        assert part.task_loss == pytest.approx(full.task_loss, rel=1e-5)
        assert part.transport_cost == pytest.approx(full.transport_cost, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_raises_before_the_update(value: float) -> None:
    goal = objective(first_module())
    optimizer = Optimizer("sgd", goal.parameters())
    z, labels = batch()
    train_step(goal, optimizer, [(z, labels)], 1, 0.1)
    before = {name: p.detach().clone() for name, p in goal.parameters().items()}
    momentum = {name: t.clone() for name, t in optimizer.state.items()}
    spoilt = z.clone()
    spoilt[3, 2] = value
    with pytest.raises(NonFiniteError, match="the loss is"):
        train_step(goal, optimizer, [(z, labels), (spoilt, labels)], 2, 0.1)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in goal.parameters().items())
    assert all(torch.equal(t, momentum[name]) for name, t in optimizer.state.items())


def test_frozen_parameters_stay() -> None:
    module = first_module()
    frozen = next(iter(module.parameters()))
    frozen.requires_grad_(False)
    before = frozen.clone()
    goal = objective(module)
    assert frozen not in set(goal.parameters().values())
    train_step(goal, Optimizer("sgd", goal.parameters(), weight_decay=0.1), [batch()], 1, 0.1)
    assert torch.equal(frozen, before)


def test_training_lowers_the_loss_and_the_last_module_needs_no_head() -> None:
    torch.manual_seed(0)
    model = build_model("resnet-preact-2x4", num_classes=3, in_shape=(1, 6, 6))
    (module,) = partition(model, torch.randn(2, 1, 6, 6), 1).modules
    goal = Objective(module, None, tau=1.0, transport="branch", transport_norm="mean", label_smoothing=0.0)
    goal.train_mode(True)
    optimizer = Optimizer("adamw", goal.parameters())
    labels = torch.arange(12) % 3
    z = torch.randn(12, 1, 6, 6) + labels.reshape(-1, 1, 1, 1)
    losses = [train_step(goal, optimizer, [(z, labels)], 1, 0.03).mean_task_loss() for _ in range(20)]
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < 0.5 * losses[0]


def test_evaluation_cuts_the_padding_off_keeps_no_graph_and_moves_no_statistics() -> None:
    model = build_model("resnet-preact-2x4", num_classes=3, in_shape=(1, 6, 6))
    module = partition(model, torch.randn(2, 1, 6, 6), 2).modules[0]
    goal = objective(module)
    goal.train_mode(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    out, logits = goal.evaluate(torch.randn(5, 1, 6, 6), 3)
    assert out.shape == (3, *module.out_shape)
    assert logits is not None
    assert logits.shape == (3, 3)
    assert not out.requires_grad
    assert not logits.requires_grad
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_an_empty_tally_has_no_means() -> None:
    assert Tally().mean_task_loss() is None
