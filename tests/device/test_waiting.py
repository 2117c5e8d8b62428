"""Torch's threads wait awake on an idle machine and asleep beside others, and nothing of it stays behind."""

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ondevice_trgl.device import waiting
from ondevice_trgl.device.waiting import Waiting, lined_up


class OpenMP:
    """Counts the teams that are held."""

    def __init__(self, processors: int = 4) -> None:
        self.processors = processors
        self.calls: list[str] = []
        self.threads: list[str] = []

    def omp_get_num_procs(self) -> int:
        return self.processors

    def GOMP_parallel(self, work: Any, data: Any, threads: ctypes.c_uint, flags: ctypes.c_uint) -> None:  # noqa: N802
        self.calls.append(f"team of {threads.value}")
        self.threads.append(threading.current_thread().name)

    def omp_pause_resource_all(self, kind: int) -> int:
        self.calls.append("end")
        self.threads.append(threading.current_thread().name)
        return 0


class Machine:
    """Seconds that pass, and that a thread stands in line."""

    def __init__(self) -> None:
        self.now = 100.0
        self.stood: dict[str, float] = {"7": 1.0}

    def after(self, seconds: float, stood: float) -> None:
        self.now += seconds
        self.stood["7"] += stood


@pytest.fixture(autouse=True)
def unchosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


def made(library: OpenMP, machine: Machine, threads: int = 4) -> Waiting:
    return Waiting(
        threads,
        library=library,  # type: ignore[arg-type]
        lined_up=lambda: dict(machine.stood),
        clock=lambda: machine.now,
    )


def test_beside_others_threads_sleep_until_it_was_quiet_for_a_while() -> None:
    library, machine = OpenMP(), Machine()
    watched = made(library, machine)
    assert library.calls == ["team of 2", "end"]  # once, so that its memory counts from the start
    machine.after(0.5, 0.5)
    assert not watched.look(), "looked too soon"
    machine.after(0.6, 0.0)
    assert watched.look()
    assert watched.asleep
    for _ in range(4):
        machine.after(1.0, 0.0)
        assert not watched.look()
    machine.after(1.0, 0.07)
    assert not watched.look(), "neither busy nor quiet"
    for _ in range(4):
        machine.after(1.0, 0.0)
        assert not watched.look()
    machine.after(1.0, 0.0)
    assert watched.look()
    assert not watched.asleep
    watched.close()
    assert library.calls == ["team of 2", "end", "team of 2", "end", "end"]
    assert set(library.threads) == {"trgl-waiting_0"}


def test_a_thread_that_ended_does_not_make_up_for_others() -> None:
    library, machine = OpenMP(), Machine()
    machine.stood["8"] = 50.0
    watched = made(library, machine)
    del machine.stood["8"]
    machine.after(1.0, 0.4)
    assert watched.look()
    watched.close()


@pytest.mark.parametrize(
    ("processors", "threads", "team"), [(2, 2, 2), (4, 2, 4), (16, 4, 14), (2, 4, 2)], ids=lambda n: str(n)
)
def test_with_the_idle_team_there_are_more_threads_than_processors(processors: int, threads: int, team: int) -> None:
    library = OpenMP(processors)
    made(library, Machine(), threads).close()
    assert library.calls[0] == f"team of {team}"
    assert threads + team - 1 > processors


@pytest.mark.parametrize("case", ["one thread", "told", "many processors", "nobody tells", "no OpenMP"])
def test_where_there_is_nothing_to_gain_or_it_was_chosen_nothing_is_started(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, machine = OpenMP(200 if case == "many processors" else 4), Machine()
    if case == "told":
        monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    if case == "no OpenMP":
        monkeypatch.setattr(waiting, "gnu_openmp", lambda: None)
    watched = Waiting(
        1 if case == "one thread" else 4,
        library=None if case == "no OpenMP" else library,  # type: ignore[arg-type]
        lined_up=lambda: None if case == "nobody tells" else dict(machine.stood),
        clock=lambda: machine.now,
    )
    machine.after(5.0, 5.0)
    assert not watched.look()
    watched.close()
    assert library.calls == []


def test_time_in_line_is_read_of_every_thread(tmp_path: Path) -> None:
    for name, text in {"3": "5 2000000000 7", "4": "damaged", "5": "1 500000000 1"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(text)
    (tmp_path / "6").mkdir()
    assert lined_up(tmp_path) == {"3": 2.0, "5": 0.5}
    assert lined_up(tmp_path / "none") is None
    (tmp_path / "empty").mkdir()
    assert lined_up(tmp_path / "empty") is None


REAL = """
import os, time, torch
from ondevice_trgl.device.waiting import Waiting, end_team, gnu_openmp

def threads(expected):  # one that was joined is listed a moment longer
    for _ in range(400):
        if (found := len(os.listdir("/proc/self/task")) - before) == expected:
            break
        time.sleep(0.005)
    return found

torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
torch.ones(1 << 20).add_(1)
print(threads(2))
end_team()
print(threads(0))
watched = Waiting(3)
if gnu_openmp() is None or watched._holder is None:
    print("skip")
else:
    print(threads(1))
    watched._sleep()
    print(threads(watched._team) == watched._team)
    watched._spin()
    print(threads(1))
watched.close()
print(threads(0))
"""


def test_teams_of_the_real_library_come_and_go(run_python: Callable[..., str]) -> None:
    lines = run_python(REAL).splitlines()
    if "skip" in lines:
        pytest.skip("needs the GNU OpenMP of torch's Linux wheels, and a kernel that tells of time in line")
    assert lines == ["2", "0", "1", "True", "1", "0"]
