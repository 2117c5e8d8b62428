"""What is learned of a module that this process has no room for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.limit import CODE_BYTES, NoLimit
from ondevice_trgl.device.meter import PeakMeter
from ondevice_trgl.model.store import evict
from ondevice_trgl.model.trace import Chain, trace
from ondevice_trgl.plan.costs import Costs
from ondevice_trgl.plan.estimate import estimate
from ondevice_trgl.plan.memo import Memo
from ondevice_trgl.plan.plan import Level, Plan, Rung
from ondevice_trgl.plan.predict import Rehearsed
from ondevice_trgl.setup.rehearse import MARGIN, Rehearsals
from ondevice_trgl.trgl.task import Task

FLOOR, MB = 100_000_000, 1_000_000


class Still(PeakMeter):
    """A process that holds `FLOOR` bytes."""

    name, kind = "VmHWM", "rss"

    def reset(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return FLOOR

    def current_bytes(self) -> int:
        return FLOOR


def parts() -> tuple[Chain, Costs, TrainConfig]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.Flatten()]
    config = TrainConfig(budget=10**9, batch_size=32)
    chain = trace(nn.Sequential(*layers, nn.Linear(32 * 32 * 32, 10)), torch.randn(2, 3, 32, 32))
    costs = estimate(chain, config)
    evict(chain.model)
    return chain, costs, config


def learned(
    room: int, predicted: int, takes: Callable[[int, int], int | None], monkeypatch: Any, tmp_path: Path
) -> tuple[Any, list[int], Costs]:
    """What is learned of the whole network at batch 32, the micro-batches that were run, its costs.

    `room` and `predicted` are above the floor; `takes(micro, tensors)` is what a rehearsal measures, None if refused.
    """
    chain, costs, config = parts()
    length, run = len(chain.segments), []
    rehearsals = Rehearsals(
        chain, config, Still(), NoLimit(), Memo(None), Task(outputs=10), room_bytes=FLOOR + room, scratch=tmp_path
    )

    def measure(scene: Any, rung: Rung, most: int, *, accumulate: bool) -> Rehearsed | None:
        run.append(rung.micro_batch_size)
        assert not accumulate  # as the full batch will not
        above = takes(rung.micro_batch_size, costs.module_bytes(0, length, rung.micro_batch_size, accumulate=False))
        return None if above is None else Rehearsed(above, True, 2.0, 1.0)

    monkeypatch.setattr(rehearsals, "_measure", measure)
    ladder = (Rung(32, False, FLOOR + predicted),)
    plan = Plan((0, length), 32, (ladder,), FLOOR + 900 * MB, FLOOR, "disk", "fp32", 0, 0, ())
    rehearsals.of(plan, costs)
    return rehearsals.above[0, length, Level(32, False)], run, costs


def test_what_fits_is_run_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, run, _ = learned(800 * MB, 700 * MB, lambda micro, tensors: 600 * MB, monkeypatch, tmp_path)
    assert (found.above_bytes, found.is_direct, run) == (MARGIN * 600 * MB, True, [32])
    assert (found.step_seconds, found.sweep_seconds) == (2.0, 1.0)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_is_too_large_is_learned_from_half_of_it(
    share: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def takes(micro: int, tensors: int) -> int:
        return int((CODE_BYTES + (1 + share) * tensors) / MARGIN)

    _, _, costs = learned(900 * MB, 100 * MB, takes, monkeypatch, tmp_path)
    full, half = (costs.module_bytes(0, len(costs.segments), m, accumulate=False) for m in (32, 16))
    predicted = full + CODE_BYTES
    found, run, _ = learned(half + CODE_BYTES + MB, predicted, takes, monkeypatch, tmp_path)
    assert run == [16]
    assert not found.is_direct
    assert (found.step_seconds, found.sweep_seconds) == (4.0, 2.0)
    kernel = costs.largest_kernel(0, len(costs.segments))
    expected = CODE_BYTES + full + share * 2 * half
    assert expected - 2 * kernel - MB <= found.above_bytes <= expected + MB


def test_a_refused_one_is_learned_from_what_passes_and_is_more_than_there_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def takes(micro: int, tensors: int) -> int | None:
        return CODE_BYTES + tensors if micro <= 8 else None

    found, run, _ = learned(950 * MB, 500 * MB, takes, monkeypatch, tmp_path)
    assert run == [32, 16, 8]
    assert (found.above_bytes, found.is_direct) == (900 * MB + 1, False)


def test_what_no_micro_batch_fits_is_tried_once_and_taken_as_estimated_where_the_run_has_more_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, run, costs = learned(30 * MB, 800 * MB, lambda micro, tensors: None, monkeypatch, tmp_path)
    assert run == [32]
    tensors = costs.tensors(0, len(costs.segments), 32, accumulate=False)
    careful = CODE_BYTES + tensors.still + 1.3 * (tensors.activations + tensors.head)
    assert careful <= found.above_bytes <= 1.02 * careful + 3 * costs.largest_kernel(0, len(costs.segments))


def test_what_is_guessed_of_modules_that_are_alike_is_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layers = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(12)]
    chain = trace(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, 10)), torch.randn(2, 8, 8, 8))
    config = TrainConfig(budget=10**9, batch_size=32)
    costs = estimate(chain, config)
    evict(chain.model)
    rehearsals = Rehearsals(
        chain, config, Still(), NoLimit(), Memo(None), Task(outputs=10), room_bytes=FLOOR + MB, scratch=tmp_path
    )
    monkeypatch.setattr(rehearsals, "_measure", lambda *args, **kwargs: None)
    bounds = (*range(12), len(chain.segments))
    ladders = ((Rung(32, False, FLOOR + 60 * MB),),) * 12
    rehearsals.of(Plan(bounds, 32, ladders, FLOOR + 900 * MB, FLOOR, "disk", "fp32", 0, 0, ()), costs)
    guessed = [rehearsals.above[k, k + 1, Level(32, False)].above_bytes for k in range(1, 11)]
    assert max(guessed) - min(guessed) <= len(guessed)  # but for rounding


def test_what_the_budget_itself_refuses_at_any_micro_batch_needs_more_than_there_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found, run, _ = learned(900 * MB, 500 * MB, lambda micro, tensors: None, monkeypatch, tmp_path)
    assert run == [32, 16, 8, 4, 2]
    assert found.above_bytes > 900 * MB
