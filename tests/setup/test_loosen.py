"""How the allocator is held, where the budget leaves a choice."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ondevice_trgl.device.allocator import HOLDS, TIGHT
from ondevice_trgl.device.limit import NoLimit
from ondevice_trgl.plan.breakdown import Breakdown
from ondevice_trgl.plan.memo import Memo
from ondevice_trgl.plan.plan import Level, Plan, Rung
from ondevice_trgl.plan.predict import Rehearsed
from ondevice_trgl.setup.loosen import loosened
from ondevice_trgl.setup.rehearse import MARGIN, Rehearsals
from ondevice_trgl.trgl.task import Task
from tests.setup.test_rehearse import FLOOR, MB, Still, parts


class Glibc(NoLimit):
    """A limit whose allocator has a choice."""

    holds = tuple(reversed(HOLDS))


def chosen(
    budget: int,
    takes: dict[str, int | None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    limit: type[NoLimit] = Glibc,
    small: bool = False,
) -> tuple[Plan, Plan, list[str]]:
    """The plan of one module of 200 MB above the floor, held tight; the same loosened; what was rehearsed for it.

    `takes`: peak above the floor by how the allocator is held; None where the limit refuses it.
    """
    chain, costs, config = parts()
    length, run, micro = len(chain.segments), [], 32
    if small:
        segments = tuple(dataclasses.replace(segment, largest=4) for segment in costs.segments)
        costs = dataclasses.replace(costs, segments=segments, input_bytes=4, output_bytes=(32_000,) * length)
    rehearsals = Rehearsals(
        chain, config, Still(), limit(), Memo(None), Task(outputs=10), room_bytes=FLOOR + budget, scratch=tmp_path
    )
    rehearsals.above[0, length, Level(micro, False)] = Rehearsed(200 * MB)

    def measure(scene: Any, rung: Rung, most: int, *, accumulate: bool) -> Rehearsed | None:
        run.append(rung.hold)
        took = takes[rung.hold]
        return None if took is None else Rehearsed(int(took / MARGIN))

    monkeypatch.setattr(rehearsals, "_measure", measure)
    ladder = (Rung(micro, False, FLOOR + 200 * MB, True), Rung(micro, True, FLOOR + 150 * MB))
    made = tuple(Breakdown(weights=MB).with_total(rung.peak_bytes, floor=FLOOR) for rung in ladder)
    plan = Plan((0, length), micro, (ladder,), FLOOR + budget, FLOOR, "disk", "fp32", 0, 0, (), breakdowns=(made,))
    return plan, loosened(plan, costs, rehearsals), run


def test_with_room_the_allocator_is_held_loose_and_made_tighter_first_where_memory_runs_short(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan, found, run = chosen(900 * MB, {"loose": 300 * MB, "firm": 250 * MB}, monkeypatch, tmp_path)
    assert run == ["loose", "firm"]
    assert [rung.hold for rung in found.ladders[0]] == ["loose", "firm", TIGHT, TIGHT]
    assert found.ladders[0][2:] == plan.ladders[0]
    peaks = [rung.peak_bytes - FLOOR for rung in found.ladders[0]]
    assert peaks[:2] == pytest.approx([300 * MB, 250 * MB], abs=9)
    assert [one.total for one in found.breakdowns[0]] == [rung.peak_bytes for rung in found.ladders[0]]
    assert found.rungs[0].hold == "loose"
    assert "allocator held loose" in str(found.rungs[0])
    assert "tightened where memory runs short" in found.reasons[-1]
    assert Plan.from_dict(found.to_dict()) == found


def test_it_is_held_as_tight_as_the_budget_needs_and_no_tighter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, found, run = chosen(260 * MB, {"loose": None, "firm": 250 * MB}, monkeypatch, tmp_path)
    assert run == ["loose", "firm"]
    assert [rung.hold for rung in found.ladders[0]] == ["firm", TIGHT, TIGHT]


def test_a_budget_that_is_full_is_not_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan, found, run = chosen(201 * MB, {}, monkeypatch, tmp_path)
    assert (found, run) == (plan, [])


def test_what_takes_no_more_is_above_the_tight_rung_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, found, _ = chosen(900 * MB, {"loose": 190 * MB, "firm": 180 * MB}, monkeypatch, tmp_path)
    assert [rung.hold for rung in found.ladders[0]] == ["loose", TIGHT, TIGHT]
    peaks = [rung.peak_bytes for rung in found.ladders[0]]
    assert peaks == sorted(set(peaks), reverse=True)


@pytest.mark.parametrize(("limit", "small"), [(NoLimit, False), (Glibc, True)])
def test_without_a_choice_or_without_large_blocks_nothing_is_rehearsed(
    limit: type[NoLimit], small: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan, found, run = chosen(900 * MB, {}, monkeypatch, tmp_path, limit=limit, small=small)
    assert (found, run) == (plan, [])
