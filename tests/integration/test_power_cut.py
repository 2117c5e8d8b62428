"""From what a disk may hold that lost its power at any instant a run goes on; the benchmark tries more of it."""

import os
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.asked_here import Trainer
from tests.benchmarks_loaded import benchmark

STATES = 8
"""Of each schedule, from its first operation to its last."""


@pytest.fixture(scope="module")
def power_cut() -> ModuleType:
    return benchmark("power_cut")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which folder is flushed")
@pytest.mark.parametrize(
    "schedule", ["sequential", *(pytest.param(one, marks=pytest.mark.long) for one in ("multi-lap", "parallel"))]
)
def test_every_state_is_gone_on_with(power_cut: ModuleType, schedule: str, tmp_path: Path) -> None:
    found = power_cut.tried(schedule, STATES, 3, Trainer, tmp_path)
    assert found["resumed"] > 2
    assert found["started again"] > 1


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which folder is flushed")
def test_a_disk_keeps_what_was_flushed_and_may_lose_the_rest(power_cut: ModuleType, tmp_path: Path) -> None:
    place = tmp_path / "recorded"
    place.mkdir()
    recorder = power_cut.Recorder(place)

    def flush(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    with recorder.recording():
        (place / "a").write_text("first")
        flush(place / "a")
        flush(place)
        (place / "b").write_text("second")
        (place / "b").replace(place / "a")  # neither flushed

    def states(instant: int) -> set[tuple[tuple[str, bytes], ...]]:
        found = set()
        for seed in range(60):
            recorder.lay_out(instant, tmp_path / "after", random.Random(seed))
            found.add(tuple(sorted((path.name, path.read_bytes()) for path in (tmp_path / "after").iterdir())))
        return found

    assert states(1) == {(("a", b"first"),)}
    last = states(2)
    assert (("a", b"first"),) in last
    assert (("a", b""),) in last
    assert (("a", b"second"),) in last
    assert all(dict(state).get("a") is not None for state in last)
