"""A step that lacks memory: undone, and done again further down the ladder as if it had been planned there."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ondevice_trgl.device.limit import NoLimit
from ondevice_trgl.device.meter import PeakMeter
from ondevice_trgl.errors import BudgetExceededError
from ondevice_trgl.model.heads import head_behind
from ondevice_trgl.model.partition import LocalModule, group
from ondevice_trgl.model.trace import trace
from ondevice_trgl.plan.plan import Rung
from ondevice_trgl.run.budget import Budget
from ondevice_trgl.run.stepper import Pressure, Stepper
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.trgl.step import Figures, Objective, Onward, Tally
from tests.run.conftest import CLASSES, net

MB = 1_000_000
LADDER = (
    Rung(8, False, 900 * MB),
    Rung(8, True, 890 * MB),
    Rung(4, False, 700 * MB),
    Rung(4, True, 600 * MB),
    Rung(4, True, 500 * MB, spilled=True),
)


class Held(PeakMeter):
    """A process that holds as much as it is told to."""

    name, kind = "told", "rss"

    def __init__(self) -> None:
        self.bytes = 100 * MB

    def reset(self) -> None: ...

    def peak_bytes(self) -> int:
        return self.bytes

    def current_bytes(self) -> int:
        return self.bytes


class Data:
    labels = torch.arange(32) % CLASSES

    def __init__(self) -> None:
        self.images = torch.randn(32, 1, 6, 6, generator=torch.Generator().manual_seed(3))
        self.shape: tuple[int, ...] = (1, 6, 6)

    def read(self, indices: Sequence[int], out: Tensor) -> Tensor:
        out[: len(indices)] = self.images[list(indices)]
        return self.labels[list(indices)]


class Scene:
    """The first module of a small network with dropout and BatchNorm, at `rung`; `refuses(rung, call)` runs short."""

    def __init__(
        self, folder: Path, rung: Rung, *, optimizer: str = "sgd", refuses: Callable[[Rung, int], bool] | None = None
    ) -> None:
        model = net(dropout=0.2)
        torch.manual_seed(5)
        chain = trace(model, torch.zeros(2, 1, 6, 6))
        partition = group(chain, (0, 2, len(chain.segments)))
        self.module: LocalModule = partition.modules[0]
        self.head: nn.Module = head_behind(self.module, "mlp", CLASSES)
        self.meter, self.calls = Held(), 0
        self.told: list[Pressure] = []
        self.budget = Budget(1000 * MB, NoLimit(), self.meter)
        self.budget.start(100 * MB)
        outer = self

        class Short(Objective):
            rung = LADDER[0]

            def backward(self, z: Tensor, labels: Tensor, share: float, onward: Onward | None = None) -> Figures:
                tally = super().backward(
                    z, labels, share, onward
                )  # gradients, statistics and random numbers are used up
                outer.calls += 1
                if refuses is not None and refuses(self.rung, outer.calls):
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
                return tally

        def objective(rung: Rung) -> Objective:
            made = Short(
                self.module,
                self.head,
                tau=10.0,
                transport="branch",
                transport_norm="mean",
                label_smoothing=0.1,
                pieces=partition.pieces(0) if rung.checkpointed else (),
            )
            made.rung = rung
            return made

        names = objective(rung).parameters()
        self.stepper = Stepper(
            objective,
            Optimizer(optimizer, names, momentum=0.9, weight_decay=1e-4),
            LADDER,
            rung,
            batch_size=8,
            in_shape=(1, 6, 6),
            in_dtype=torch.float32,
            device=torch.device("cpu"),
            budget=self.budget,
            scratch=folder,
            notify=lambda pressure, rung: self.told.append(pressure),
        )
        self.stepper.objective.train_mode(True)

    def step(self, number: int) -> Tally:
        return self.stepper.step(Data(), range(8 * number, 8 * number + 8), 0.1)

    def state(self) -> dict[str, Tensor]:
        both = nn.ModuleList([self.module, self.head])
        optim = {f"optim.{name}": tensor for name, tensor in self.stepper.optimizer.state.items()}
        return {name: tensor.clone() for name, tensor in (both.state_dict() | optim).items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_lowered_step_equals_one_that_was_planned_lower(optimizer: str, tmp_path: Path) -> None:
    def full(rung: Rung, call: int) -> bool:
        return call > 1 and rung.micro_batch_size == 8

    lowered = Scene(tmp_path / "a", LADDER[0], optimizer=optimizer, refuses=full)
    planned = Scene(tmp_path / "b", LADDER[0], optimizer=optimizer)
    torch.manual_seed(17)
    planned.step(0)
    planned.stepper._take(LADDER[2])  # from the start of the second step
    planned.stepper.objective.train_mode(True)
    second = planned.step(1), planned.step(2)
    torch.manual_seed(17)
    lowered.step(0)
    again = lowered.step(1), lowered.step(2)
    assert lowered.stepper.rung == LADDER[2]
    assert [vars(tally) for tally in again] == [vars(tally) for tally in second]
    expected, found = planned.state(), lowered.state()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_first_memory_is_given_back_then_the_next_rung_that_takes_notably_less_is_tried(tmp_path: Path) -> None:
    scene = Scene(tmp_path, LADDER[0], refuses=lambda rung, call: rung.micro_batch_size == 8)
    scene.step(0)
    assert [(one.before, one.after) for one in scene.told] == [
        ("micro-batch 8", "memory given back, tried again"),
        ("micro-batch 8", "micro-batch 4"),  # 890 MB of 900 would be refused as well
    ]
    assert "can't allocate memory" in scene.told[0].cause


def test_a_module_whose_head_is_being_warmed_stays_as_it_is_on_a_lower_rung(tmp_path: Path) -> None:
    scene = Scene(tmp_path, LADDER[0], refuses=lambda rung, call: rung.micro_batch_size == 8)
    before = {name: tensor.clone() for name, tensor in scene.module.state_dict().items()}
    scene.stepper.objective.warming = True
    scene.stepper.objective.train_mode(True)
    scene.step(0)
    assert scene.stepper.rung == LADDER[2]
    assert scene.stepper.objective.warming
    assert all(torch.equal(tensor, before[name]) for name, tensor in scene.module.state_dict().items())


def test_below_the_last_rung_there_is_an_error_and_everything_is_as_before(tmp_path: Path) -> None:
    scene = Scene(tmp_path, LADDER[3], refuses=lambda rung, call: call > 2)
    scene.step(0)
    before, random = scene.state(), torch.get_rng_state()
    with pytest.raises(BudgetExceededError, match="nothing smaller is left"):
        scene.step(1)
    assert scene.stepper.rung == LADDER[-1]
    after = scene.state()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert torch.equal(random, torch.get_rng_state())


def test_what_an_app_has_come_to_hold_is_left_to_it_before_anything_is_refused(tmp_path: Path) -> None:
    scene = Scene(tmp_path, LADDER[0])
    scene.step(0)
    scene.meter.bytes += 5 * MB  # noise
    scene.step(1)
    assert scene.stepper.rung == LADDER[0]
    scene.meter.bytes += 250 * MB
    scene.step(2)
    assert scene.stepper.rung == LADDER[2]
    assert [one.cause for one in scene.told] == ["memory is in use beside training"]
    assert scene.budget.room < 1000 * MB - 250 * MB
    scene.meter.bytes -= 255 * MB
    scene.budget.between_modules()
    assert scene.budget.room == 1000 * MB


def test_a_step_that_took_more_than_was_seen_coming_lowers_the_next(tmp_path: Path) -> None:
    scene = Scene(tmp_path, LADDER[0])
    scene.step(0)
    scene.stepper.overran(1100 * MB)
    assert scene.stepper.rung == LADDER[0]  # at first, memory is given back
    scene.stepper.overran(1100 * MB)
    assert scene.stepper.rung == LADDER[2]
    scene.step(1)
    assert "in the step before" in scene.told[-1].cause


def test_a_rung_says_how_the_allocator_is_held_in_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, dataclasses.replace(LADDER[0], hold="loose"))
    held: list[str] = []
    monkeypatch.setattr(scene.budget.limit, "hold", held.append)
    scene.step(0)
    assert held == ["loose"]
    scene.stepper._take(LADDER[1])
    scene.step(1)
    assert held == ["loose", "tight"]
