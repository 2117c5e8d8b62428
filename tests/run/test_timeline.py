"""Few points of what was held, the highest among them, whatever the time that a run takes."""

from hypothesis import given
from hypothesis import strategies as st

from ondevice_trgl.run.timeline import MOST, Timeline
from tests.run.conftest import At, Fit


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=2000))
def test_points_are_few_in_order_and_have_the_highest(held: list[int]) -> None:
    now, left = [0.0], iter(held)
    seen: list[int] = []

    def look() -> int:
        seen.append(next(left))
        return seen[-1]

    line = Timeline(look, clock=lambda: now[0])
    for number in range(len(held)):
        now[0] += 0.3
        line.look(number // 100)
    assert 1 <= len(line.points) <= MOST
    assert max(point[1] for point in line.points) == max(seen)
    assert [point[0] for point in line.points] == sorted(point[0] for point in line.points)


def test_a_run_that_is_resumed_goes_on_behind_what_was_before(fit: Fit) -> None:
    paused = fit("run", callbacks=[At("on_step_end", 10, lambda run: run.request_pause())])
    report = fit("run", resume=True)
    before, after = list(paused.timeline), list(report.timeline)
    assert 1 <= len(before) < len(after)
    assert after[: len(before)] == before
    assert after[len(before)]["seconds"] >= paused.seconds.total > before[-1]["seconds"]
    assert {point["module"] for point in after} <= {0, 1, 2, 3}
    assert all(point["bytes"] > 50_000_000 for point in after)
