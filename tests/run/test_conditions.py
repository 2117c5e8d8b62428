"""Training as a guest: it rests as asked to, and while the device is too hot or its battery too empty."""

import json
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ondevice_trgl import Callback, ConfigError, RunState, UsageError
from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device import sensors
from ondevice_trgl.run import conditions
from ondevice_trgl.run.conditions import Conditions
from tests.run.conftest import Fit


class Clock:
    """Time passes by sleeping, and by `work`."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def guest(clock: Clock, told: list[str] | None = None, asked: Any = lambda: False, **settings: Any) -> Conditions:
    told = [] if told is None else told
    return Conditions(TrainConfig(budget="1GB", **settings), asked, told.append, clock=clock, sleep=clock.sleep)


def reads(monkeypatch: pytest.MonkeyPatch, sensor: str, *values: float | None) -> None:
    """The sensor gives these in turn, the last one ever after."""

    def one_after_another() -> Iterator[float | None]:
        yield from values
        while True:
            yield values[-1]

    source = one_after_another()
    monkeypatch.setattr(sensors, sensor, lambda: next(source))


@pytest.mark.parametrize(("nice", "rested"), [(100.0, 0.0), (50.0, 2.0), (25.0, 6.0), (80.0, 0.5)])
def test_it_computes_the_share_of_the_time_that_it_was_given(nice: float, rested: float) -> None:
    clock = Clock()
    found = guest(clock, nice=nice)
    for _ in range(3):
        clock.now += 2.0
        found.rest()
    assert sum(clock.slept) == pytest.approx(3 * rested)
    assert found.rested() == pytest.approx(3 * rested)
    assert max(clock.slept, default=0.0) <= 0.2, "a pause would have to wait"
    assert set(found.facts()) == ({"waited_for_nice"} if rested else set())


def test_what_was_no_computing_is_not_rested_for() -> None:
    clock = Clock()
    found = guest(clock, nice=50.0)
    clock.now += 3600.0  # the machine was asleep
    found.rest()
    assert sum(clock.slept) == pytest.approx(10.0)


def test_a_pause_ends_any_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    reads(monkeypatch, "celsius", 90.0)
    found = guest(clock, asked=lambda: len(clock.slept) >= 3, nice=10.0, max_celsius=70)
    clock.now += 8.0
    found.rest()
    assert len(clock.slept) == 3


def test_when_it_is_too_hot_it_waits_until_it_is_clearly_cooler(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = Clock(), list[str]()
    reads(monkeypatch, "celsius", 60.0, 70.0, 71.0, 69.0, 66.0, 65.0, 71.0)
    found = guest(clock, told, max_celsius=70)  # looks once, to see that there is a sensor
    found.rest()
    assert (told, clock.slept) == ([], [])
    clock.now += 5.0
    found.rest()
    assert told == ["the device at 71 \u00b0C, goes on at 65 \u00b0C", ""]
    assert found.facts() == {"waited_for_heat": pytest.approx(15.0)}
    found.rest()
    assert len(told) == 2, "sensors are looked at every few seconds"


def test_a_battery_that_is_low_is_waited_for_until_it_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = Clock(), list[str]()
    reads(monkeypatch, "battery_percent", 80.0, 19.0, 19.0, 24.0, 100.0)
    found = guest(clock, told, min_battery=20)
    found.rest()
    assert told == ["the battery at 19 %, goes on at 25 %", ""]
    assert found.facts() == {"waited_for_battery": pytest.approx(15.0)}


def test_a_sensor_that_goes_away_does_not_hold_training_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    reads(monkeypatch, "celsius", 60.0, 90.0, None)
    guest(clock, max_celsius=70).rest()
    assert sum(clock.slept) == pytest.approx(5.0)


@pytest.mark.parametrize(("setting", "sensor"), [("max_celsius", "celsius"), ("min_battery", "battery_percent")])
def test_what_the_machine_does_not_tell_is_refused(
    monkeypatch: pytest.MonkeyPatch, fit: Fit, setting: str, sensor: str
) -> None:
    reads(monkeypatch, sensor, None)
    settings: dict[str, Any] = {setting: 50}
    with pytest.raises(UsageError, match=rf"{setting}: this machine(.|\n)*leave out --{setting.replace('_', '-')}"):
        fit("run", **settings)
    assert "trgl-compute" not in " ".join(thread.name for thread in threading.enumerate())


def test_a_run_waits_says_so_and_ends_as_any_other(monkeypatch: pytest.MonkeyPatch, fit: Fit, whole: Any) -> None:
    monkeypatch.setattr(conditions, "_LOOK_SECONDS", 0.001)
    reads(monkeypatch, "celsius", 60.0, 60.0, 80.0, 79.0, 60.0)
    seen: list[str] = []

    class Watch(Callback):
        def on_wait(self, run: RunState) -> None:
            seen.append(run.waiting)

    report = fit("run", max_celsius=70, nice=90, callbacks=[Watch()])
    assert seen == ["the device at 80 \u00b0C, goes on at 65 \u00b0C", ""]
    assert report.system["waited_for_heat"] > 0.0
    assert report.system["waited_for_nice"] > 0.0
    events = [json.loads(line)["event"] for line in (fit.path("run") / "events.jsonl").read_text().splitlines()]
    assert [event for event in events if event in ("waits", "goes_on")] == ["waits", "goes_on"]
    assert fit.weights("run") == whole()


def test_it_waits_while_others_compute_much_and_goes_on_when_they_take_notably_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = iter([0.0, 30.0, 60.0, 45.0, 41.0, 40.0, 39.0])
    monkeypatch.setattr(sensors.Load, "percent", lambda self: next(found))
    clock, told = Clock(), []  # type: ignore[var-annotated]
    resting = guest(clock, told, max_load=50.0)
    for _ in range(3):
        clock.now += 6.0
        resting.rest()
    assert told == ["what others compute at 60 %, goes on at 40 %", ""]
    assert resting.facts() == {"waited_for_load": pytest.approx(15.0)}


def test_the_load_of_others_is_without_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Times(tuple[float, ...]):
        idle = property(lambda self: self[1])

    monkeypatch.setattr("psutil.cpu_times", lambda: Times(times[0]))
    monkeypatch.setattr("os.times", lambda: os.times_result((times[1], 0.0, 0.0, 0.0, 0.0)))
    times: tuple[tuple[float, ...], float] = (100.0, 50.0), 10.0
    load = sensors.Load()
    times = (130.0, 60.0), 20.0  # 30 s busy, 10 of them ours, in 40
    assert load.percent() == pytest.approx(50.0)
    assert load.percent() == 0.0  # at once again: no time has passed
    times = (130.0, 80.0), 20.0
    assert load.percent() == 0.0
    times = (140.0, 80.0), 35.0  # ours is counted more finely
    assert load.percent() == 0.0


def test_this_machine_tells_of_its_load() -> None:
    value = sensors.Load().percent()
    assert value is not None
    assert 0.0 <= value <= 100.0


def test_it_waits_while_the_app_says_so_and_tells_why() -> None:
    answers: list[object] = [False, "the camera is open", True, True, 0, None]
    clock, told = Clock(), []  # type: ignore[var-annotated]
    resting = guest(clock, told, wait_while=lambda: answers.pop(0))
    for _ in range(3):
        resting.rest()
    assert answers == []
    assert told == ["the camera is open", ""]
    assert resting.facts() == {"waited_for_app": pytest.approx(0.6)}


def test_a_pause_ends_a_wait_for_the_app() -> None:
    asked = iter([False, False, True, True, True, True])
    resting = guest(Clock(), [], lambda: next(asked), wait_while=lambda: True)
    resting.rest()


def test_what_an_app_says_is_named_and_imported() -> None:
    with pytest.raises(UsageError, match="wait_while 'nowhere:busy' cannot be imported"):
        guest(Clock(), wait_while="nowhere:busy")
    assert TrainConfig(wait_while=test_what_an_app_says_is_named_and_imported).to_dict()["wait_while"] == (
        "tests.run.test_conditions:test_what_an_app_says_is_named_and_imported"
    )
    with pytest.raises(ConfigError, match=r"wait_while = 3: expected pkg\.module:callable, or a callable"):
        TrainConfig(wait_while=3)  # type: ignore[arg-type]


def test_when_it_rests_may_change_from_sitting_to_sitting(fit: Fit) -> None:
    class Pause(Callback):
        def on_step_end(self, run: RunState) -> None:
            run.request_pause()

    assert fit("run", callbacks=[Pause()], nice=90.0).status == "paused"
    said: list[int] = []
    report = fit("run", resume=True, wait_while=lambda: said.append(1), checkpoint_every="1steps")
    assert report.status == "completed"
    assert len(said) > 20


@pytest.mark.parametrize("wrong", [{"wait_while": "nowhere:busy"}, {"max_celsius": 50.0}])
def test_what_cannot_be_read_is_refused_before_anything_is_set_up(
    wrong: dict[str, Any], fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensors, "celsius", lambda: None)
    with pytest.raises(UsageError):
        fit("run", **wrong)
    assert not fit.path("run").exists()
