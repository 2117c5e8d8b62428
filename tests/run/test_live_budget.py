"""A budget that changes while a run trains: from any thread, by a function of the app's, by a policy, on resume."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from ondevice_trgl import Callback, Report, RunState, UsageError
from ondevice_trgl.errors import SizeError
from ondevice_trgl.policy import Stated
from ondevice_trgl.run.run_dir import RECORD, read_json
from ondevice_trgl.trainer import Trainer as Trainers
from tests.asked_here import Trainer, ask_here
from tests.run.conftest import Fit, config, net, samples

GB = 10**9


class Seen(Callback):
    """The budget at every step, and what is done at one of them."""

    def __init__(self, **at: Any) -> None:
        self.budgets: list[tuple[int, int, int]] = []
        self._at = at

    def on_step_end(self, run: RunState) -> None:
        self.budgets.append((run.module, len(self.budgets), run.budget_bytes // GB))
        for step, what in self._at.items():
            if int(step[1:]) == len(self.budgets):
                what()


def trained(folder: Path, budget: Stated, seen: Seen, *, trainers: list[Any] | None = None) -> Report:
    trainer = Trainer(net(), config(budget=budget), run_dir=folder / "run", callbacks=[seen])
    if trainers is not None:
        trainers.append(trainer)
    return trainer.fit(samples(26), samples(9, 1))  # 3 modules and the classifier, of 2 epochs of 3 steps


def test_a_smaller_budget_holds_from_the_next_step_a_larger_one_from_the_next_module(tmp_path: Path) -> None:
    trainers: list[Any] = []

    def ask(budget: str) -> None:
        thread = threading.Thread(target=trainers[0].set_budget, args=(budget,))
        thread.start()
        thread.join()

    seen = Seen(_2=lambda: ask("40GB"), _8=lambda: ask("50GB"))
    report = trained(tmp_path, "64GB", seen, trainers=trainers)
    assert [budget for _, _, budget in seen.budgets] == [64] * 2 + [40] * 10 + [50] * 12
    assert [stretch["budget_bytes"] // GB for stretch in report.budgets] == [64, 40, 50]
    assert all(0 < stretch["measured_peak_bytes"] < 40 * GB for stretch in report.budgets)
    assert report.held


def test_what_is_asked_for_while_fit_plans_holds_from_the_first_step(tmp_path: Path) -> None:
    class Pausing(Trainers):
        def _stage_and_plan(self, *args: Any, **kwargs: Any) -> Any:
            self.set_budget("40GB")
            self.request_pause()
            return super()._stage_and_plan(*args, **kwargs)

    seen = Seen()
    trainer = Pausing(net(), config(budget="64GB"), run_dir=tmp_path / "run", callbacks=[seen], ask=ask_here)
    assert trainer.fit(samples(26)).status == "paused"
    assert seen.budgets == [(0, 0, 40)]
    with pytest.raises(UsageError, match="nothing is training"):
        trainer.set_budget("30GB")


def test_a_pause_that_is_asked_for_before_is_not_lost_and_holds_once(tmp_path: Path) -> None:
    trainer = Trainer(net(), config(), run_dir=tmp_path / "run")
    trainer.request_pause()
    assert trainer.fit(samples(26)).status == "paused"
    assert trainer.fit(samples(26), resume=True).status == "completed"


def test_a_function_is_asked_between_steps(tmp_path: Path) -> None:
    seen = Seen()
    report = trained(tmp_path, lambda: (64 if len(seen.budgets) < 4 else 30) * GB, seen)
    assert [budget for _, _, budget in seen.budgets] == [64] * 4 + [30] * 20
    assert [stretch["budget_bytes"] // GB for stretch in report.budgets] == [64, 30]
    assert read_json(tmp_path / "run" / RECORD)["stated"] == ""


def test_what_a_function_raises_stops_the_run_which_can_be_resumed(fit: Fit) -> None:
    calls = []

    def broken() -> int:
        calls.append(1)
        if len(calls) == 9:
            raise ValueError("the battery is gone")
        return 64 * GB

    with pytest.raises(ValueError, match="the battery is gone"):
        fit("run", budget=broken)
    assert fit("run", resume=True).status == "completed"
    assert fit("whole").status == "completed"
    assert fit.weights("run") == fit.weights("whole")


def test_a_policy_is_remembered_and_told(tmp_path: Path) -> None:
    report = trained(tmp_path, "90% of RAM", Seen())
    assert read_json(tmp_path / "run" / RECORD)["stated"] == "90% of RAM"
    assert "90% of RAM" in report.plan.reasons[0]


def test_each_sitting_is_held_against_its_own_budget(fit: Fit) -> None:
    class Pause(Callback):
        def on_step_end(self, run: RunState) -> None:
            run.request_pause()

    assert fit("run", callbacks=[Pause()]).budgets == ()
    report = fit("run", resume=True, budget="50GB")
    assert [stretch["budget_bytes"] // GB for stretch in report.budgets] == [64, 50]
    assert report.held


APP = """
import sys, threading
from tests.run.conftest import config, net, samples
from ondevice_trgl import BudgetExceededError, Callback, Trainer

class Cut(Callback):
    steps = 0
    def on_step_end(self, run):
        self.steps += 1
        if self.steps == 3:
            trainer.set_budget("60MB")

def work():
    while not over.is_set():
        thread = threading.Thread(target=bytearray, args=(100_000,))
        thread.start()
        thread.join()

over = threading.Event()
app = threading.Thread(target=work)
app.start()
trainer = Trainer(net(), config(budget="600MB"), run_dir=sys.argv[1], callbacks=[Cut()])
try:
    trainer.fit(samples(26))
except BudgetExceededError as error:
    print(error.message)
over.set()
app.join()
trainer = Trainer(net(), config(budget="600MB"), run_dir=sys.argv[1])
print(trainer.fit(samples(26), resume=True).status)
"""


@pytest.mark.long
def test_a_budget_below_what_is_held_ends_the_fit_and_no_thread_of_the_app_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", APP, str(tmp_path / "run")]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr  # where threads say that they were refused
    told, status = ended.stdout.splitlines()
    assert told.startswith("the budget of 57 MiB (60,000,000 bytes) cannot be held") or "57" in told
    assert status == "completed"


def test_what_the_caller_gets_wrong(tmp_path: Path) -> None:
    trainer = Trainer(net(), config(), run_dir=tmp_path / "run")
    with pytest.raises(UsageError, match="nothing is training"):
        trainer.set_budget("500MB")
    for wrong in ("plenty", "free-RAM minus", 0, lambda: "plenty"):
        with pytest.raises(SizeError):
            trainer.set_budget(wrong)
