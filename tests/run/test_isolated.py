"""A fit in a process of its own does what a fit here does, and what happens to it does not happen to the app."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from ondevice_trgl import BudgetInfeasibleError, Callback, RunState, Trainer, UsageError
from ondevice_trgl.errors import ProcessDiedError
from tests.run.conftest import config, net, samples


class Counting(Callback):
    """Counts steps, and does something behind one of them."""

    def __init__(self, at: int = 0, what: Any = None) -> None:
        self.steps, self.at, self.what = 0, at, what
        self.places: set[tuple[int, int]] = set()
        self.error: BaseException | None = None

    def on_step_end(self, run: RunState) -> None:
        self.steps += 1
        self.places.add((os.getpid(), threading.get_ident()))
        if self.steps == self.at:
            self.what(run)

    def on_exception(self, run: RunState, error: BaseException) -> None:
        self.error = error

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def kill(run: RunState) -> None:
    (child,) = psutil.Process().children()
    child.kill()


def isolated(folder: Path, *callbacks: Callback, model: Any = net, **changes: Any) -> Trainer:
    settings = {"checkpoint_every": "1steps", "budget": "2GB", "loss": nn.functional.cross_entropy, **changes}
    return Trainer(model, config(**settings), run_dir=folder / "run", callbacks=callbacks, isolate=True)


def weights(trainer: Trainer) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in trainer.export("last").state_dict().items()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    trainer = Trainer(
        net(), config(budget="2GB", loss=nn.functional.cross_entropy), run_dir=tmp_path_factory.mktemp("here") / "run"
    )
    assert trainer.fit(samples(26), samples(9, 1)).status == "completed"
    return weights(trainer)


def test_the_model_is_in_use_until_what_was_trained_is_loaded(tmp_path: Path, expected: dict[str, bytes]) -> None:
    model, counting = net(), Counting()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = isolated(tmp_path, counting, model=model)
    report = trainer.fit(samples(26), samples(9, 1))
    assert report.status == "completed"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert counting.places == {(os.getpid(), threading.get_ident())}
    assert counting.steps == 24
    assert weights(trainer) == expected
    assert not psutil.Process().children()


@pytest.mark.long
def test_whatever_ends_it_the_app_goes_on_and_so_does_the_run(tmp_path: Path, expected: dict[str, bytes]) -> None:
    data = samples(26), samples(9, 1)
    with pytest.raises(ProcessDiedError, match="ended by SIGKILL") as died:
        isolated(tmp_path, Counting(3, kill)).fit(*data)
    assert "fit(resume=True) goes on" in died.value.hint
    assert died.value.returncode == -signal.SIGKILL

    def fail(run: RunState) -> None:
        raise LookupError("the app's own")

    failing = Counting(9, fail)
    with pytest.raises(LookupError, match="the app's own"):
        isolated(tmp_path, failing).fit(*data, resume=True)
    pausing = Counting(14, lambda run: run.request_pause())
    trainer = isolated(tmp_path, pausing)
    assert trainer.fit(*data, resume=True).status == "paused"
    assert pausing.steps == 14  # with those of the processes before: it was given its state back
    counting = Counting(16, lambda run: trainer.set_budget(lambda: 1_900_000_000))
    trainer = isolated(tmp_path, counting)
    report = trainer.fit(*data, resume=True)
    assert (report.status, counting.steps) == ("completed", 24)
    assert [period["budget_bytes"] for period in report.budgets][-1] == 1_900_000_000
    assert weights(trainer) == expected


def test_errors_cross_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(BudgetInfeasibleError) as refused:
        isolated(tmp_path, budget=lambda: 1_000_000).fit(samples(26))
    assert refused.value.smallest_feasible_budget_bytes > 50_000_000
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="nothing is training"):
        isolated(tmp_path).set_budget("1GB")
    with pytest.raises(UsageError, match="cannot be given to another process"):
        isolated(tmp_path, model=lambda: net()).fit(samples(26))
    with pytest.raises(UsageError, match="nothing is trained yet"):
        isolated(tmp_path).export()
