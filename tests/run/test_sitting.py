"""A process that was killed for want of memory: the next one starts a rung lower, and says so."""

import json
from pathlib import Path
from typing import Any

import pytest

from ondevice_trgl import Callback, RunState
from ondevice_trgl.device.container import boot, oom_kills
from ondevice_trgl.run import sitting
from ondevice_trgl.run.run_dir import SITTING
from tests.run.conftest import Fit


class Told(Callback):
    """What memory pressure was told of, with the module."""

    def __init__(self) -> None:
        self.modules: list[int] = []

    def on_budget_pressure(self, run: RunState) -> None:
        self.modules.append(run.module)


class Copied(Callback):
    """Keeps the file as a process that is killed leaves it, behind the `step`-th step of all."""

    def __init__(self, step: int) -> None:
        self.left, self.text = step, ""

    def on_step_end(self, run: RunState) -> None:
        self.left -= 1
        if not self.left:
            self.text = (run.run_dir / SITTING).read_text()
            run.request_pause()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {"kills": 3, "boot": "one"}
    monkeypatch.setattr(sitting, "oom_kills", lambda: found["kills"])
    monkeypatch.setattr(sitting, "boot", lambda: found["boot"])
    return found


def killed(fit: Fit, step: int, **settings: Any) -> None:
    copied = Copied(step)
    assert fit("part", callbacks=[copied], **settings).status == "paused"
    assert not (fit.path("part") / SITTING).exists()
    (fit.path("part") / SITTING).write_text(copied.text)
    path = fit.path("part") / "plan.json"
    plan = json.loads(path.read_text())
    for ladder, breakdowns in zip(plan["ladders"], plan["breakdowns"], strict=True):
        for micro in (4, 2):  # so small a network takes no less there
            ladder.append({**ladder[0], "micro_batch_size": micro, "peak_bytes": ladder[-1]["peak_bytes"] - 1})
            breakdowns.append(breakdowns[0])
    path.write_text(json.dumps(plan))


@pytest.mark.parametrize("settings", [{}, {"schedule": "parallel"}])
def test_the_next_one_starts_a_rung_lower_and_says_so(
    settings: dict[str, Any], fit: Fit, counted: dict[str, Any]
) -> None:
    killed(fit, 3 if settings else 8, **settings)
    counted["kills"] += 1
    told = Told()
    report = fit("part", resume=True, callbacks=[told], **settings)
    lowered = [entry for entry in report.pressure if "killed for want of memory" in entry["cause"]]
    assert [entry["module"] for entry in lowered] == ([0, 1, 2] if settings else [1])
    assert told.modules
    assert all(entry["before"] == "micro-batch 8" for entry in lowered)
    assert all(entry["after"] == "micro-batch 4" for entry in lowered)
    assert not (fit.path("part") / SITTING).exists()


@pytest.mark.parametrize(
    "change", [{}, {"kills": 4, "boot": "two"}, {"kills": None}, {"kills": 4, "text": "{"}, {"kills": 4, "text": "{}"}]
)
def test_else_nothing_is_lowered(change: dict[str, Any], fit: Fit, counted: dict[str, Any]) -> None:
    killed(fit, 8)
    counted.update(change)
    if "text" in change:
        (fit.path("part") / SITTING).write_text(change["text"])
    report = fit("part", resume=True)
    assert (report.status, report.pressure) == ("completed", ())


def test_killed_again_and_again_it_goes_down_to_the_last_rung(fit: Fit, counted: dict[str, Any]) -> None:
    killed(fit, 2)
    rungs = []
    for _ in range(4):
        counted["kills"] += 1
        copied = Copied(1)
        fit("part", resume=True, callbacks=[copied])
        rungs.append(json.loads(copied.text)["rungs"].get("0"))
        (fit.path("part") / SITTING).write_text(copied.text)
    assert rungs[:4] == [1, 2, 2, 2]


def test_what_the_kernel_counts(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 3\noom_kill 12\n")
    assert (oom_kills(tmp_path), oom_kills(tmp_path / "none")) == (12, None)
    assert boot(tmp_path) == ""
