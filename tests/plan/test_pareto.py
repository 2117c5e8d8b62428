"""What is listed beside the plan: nothing that another beats, and no seconds that nothing was timed for."""

import dataclasses
import json
from itertools import product

from ondevice_trgl.plan.pareto import Choice, thinned, unbeaten
from ondevice_trgl.plan.plan import Level, Plan
from ondevice_trgl.plan.predict import Rehearsed
from tests.plan.test_planner import FLOOR, ROWS, TRAIN_ROWS, learned

BASE = Choice(2, 32, False, "fp32", 100, 10.0, 50)


def test_only_what_another_beats_in_all_three_is_left_out() -> None:
    every = [
        dataclasses.replace(BASE, predicted_peak_bytes=peak, seconds_per_epoch=seconds, cache_bytes=disk)
        for peak, seconds, disk in product((1, 2, 3), (1.0, 2.0, 3.0), (1, 2, 3))
        if peak + seconds + disk >= 6
    ]
    found = unbeaten(every)
    assert all(one.predicted_peak_bytes + (one.seconds_per_epoch or 0) + one.cache_bytes == 6 for one in found)
    assert len(found) == 7
    assert set(unbeaten(reversed(every))) == set(found)


def test_without_seconds_only_what_does_no_more_work_beats_another() -> None:
    unknown = dataclasses.replace(BASE, seconds_per_epoch=None)
    smaller = dataclasses.replace(unknown, micro_batch=16, predicted_peak_bytes=60)
    again = dataclasses.replace(unknown, checkpointed=True, predicted_peak_bytes=70)
    larger = dataclasses.replace(unknown, modules=3, predicted_peak_bytes=110, cache_bytes=60)
    assert unbeaten([unknown, smaller, again, larger]) == (unknown, again, smaller)
    assert unbeaten([BASE, dataclasses.replace(smaller, seconds_per_epoch=9.0)])[0].micro_batch == 16


def test_seconds_are_those_of_rehearsed_steps_and_nothing_else() -> None:
    before = learned({})
    assert before.pareto
    assert all(choice.seconds_per_epoch is None for choice in before.pareto)
    a, b, c = before.bounds
    batch = before.batch_size
    above = [peak - FLOOR for peak in before.predicted_peak_bytes]
    known = {(a, b, Level(batch, False)): Rehearsed(above[0], True, 2.0, 1.0)}
    assert all(choice.seconds_per_epoch is None for choice in learned(known).pareto)
    known[b, c, Level(batch, False)] = Rehearsed(above[1], True, 3.0, 0.5)
    after = learned(known, epochs=3)
    (timed,) = (one for one in after.pareto if one.seconds_per_epoch is not None)
    seconds = TRAIN_ROWS // batch * 5.0 + -(-ROWS // batch) * 1.5 / 3
    assert timed.seconds_per_epoch is not None
    assert abs(timed.seconds_per_epoch - seconds) < 1e-9
    assert timed.predicted_peak_bytes == after.peak_bytes
    assert (timed.modules, timed.micro_batch, timed.checkpointed) == (2, batch, False)
    assert timed.cache_bytes == after.cache_bytes


def test_more_modules_and_less_memory_are_listed_and_survive_json() -> None:
    made = learned({}, modules="auto")
    assert len({choice.modules for choice in made.pareto}) > 2
    assert any(choice.checkpointed for choice in made.pareto)
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_what_a_person_cannot_tell_apart_is_left_out() -> None:
    unknown = dataclasses.replace(BASE, seconds_per_epoch=None)
    peaks = (1000, 990, 960, 950, 940, 500)
    given = [dataclasses.replace(unknown, predicted_peak_bytes=peak, modules=k + 1) for k, peak in enumerate(peaks)]
    given[3] = dataclasses.replace(given[3], seconds_per_epoch=1.0)
    assert [choice.predicted_peak_bytes for choice in thinned(given)] == [1000, 960, 950, 500]
    narrow = dataclasses.replace(given[1], cache_dtype="bf16")
    assert narrow in thinned([given[0], narrow, *given[2:]])
    assert thinned([]) == ()
