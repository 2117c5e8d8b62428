"""Modules that stop when validation no longer gains, and runs that end when deeper modules no longer help."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ondevice_trgl import Callback, DataError, Report, RunState, TrainConfig
from ondevice_trgl.config import Workload
from ondevice_trgl.errors import ConfigError, UsageError
from ondevice_trgl.export import export_run
from ondevice_trgl.job import Job
from ondevice_trgl.jobs import evaluate_run, resume_job
from ondevice_trgl.report.html import to_html
from ondevice_trgl.report.text import accuracy_line, gain_line, module_table, report_lines
from ondevice_trgl.run import scheduler
from ondevice_trgl.run.module_run import ModuleRun
from ondevice_trgl.run.stalled import has_stalled
from tests.asked_here import Trainer, train_job
from tests.run.conftest import At, CrashError, Fit, config, crash, net, samples

pytestmark = pytest.mark.usefixtures("code_pages_kept")

EPOCHS, PATIENCE = 6, 2
USUAL: dict[str, Any] = {"epochs": EPOCHS, "patience": PATIENCE, "lr": 0.02}


def events(fit: Fit, name: str, kind: str) -> list[dict[str, Any]]:
    lines = (fit.path(name) / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def judged(fit: Fit, name: str) -> dict[int, list[float]]:
    """By module, the accuracy behind each epoch."""
    found: dict[int, list[float]] = {}
    for event in events(fit, name, "validation"):
        found.setdefault(event["module"], []).append(event["val_accuracy"])
    return found


def test_a_module_stops_and_keeps_its_best_epoch(fit: Fit) -> None:
    report = fit("run", **USUAL)
    values = judged(fit, "run")
    assert sorted(values) == [0, 1, 2, 3]
    for module in report.heads:
        known = values[module.index]
        best = known.index(max(known))
        assert module.best_epoch == best
        assert module.val_accuracy == known[best]  # of what goes on to the next module
        assert len(known) == min(best + PATIENCE + 1, EPOCHS)
        assert module.epochs == pytest.approx(len(known))
    assert any(len(known) < EPOCHS for known in values.values())
    assert report.seconds.validation > 0
    assert not [path for path in (fit.path("run") / "modules").iterdir() if "best" in path.name]
    assert f"(epoch {report.modules[0].best_epoch + 1} of" in module_table(report).rows[0][1].text  # type: ignore[operator]


def test_validation_behind_every_epoch_changes_nothing_else(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """With endless patience, and the last epoch taken for the best, dropout's random numbers are those of before."""
    fit("plain", model=net(dropout=0.3), epochs=3)
    monkeypatch.setattr(ModuleRun, "_is_stalled", lambda *args: False)
    monkeypatch.setattr("ondevice_trgl.run.best.Best.bring_back", lambda *args: None)
    fit("run", model=net(dropout=0.3), epochs=3, patience=9)
    assert fit.weights("run") == fit.weights("plain")


TWO_LAPS: dict[str, Any] = {"schedule": "multi-lap", "laps": 2, "warm_heads": 1}


@pytest.mark.parametrize(
    ("hook", "number", "settings"),
    [
        ("on_step_end", 3, {}),  # the last step of an epoch, in front of its validation
        ("on_epoch_end", 3, TWO_LAPS),
    ],
)
def test_it_resumes_bit_for_bit(fit: Fit, hook: str, number: int, settings: dict[str, Any]) -> None:
    given = {**USUAL, "epochs": 4, "patience": 1, **settings}
    whole = fit("whole", **given)
    if hook == "on_step_end":
        fit("part", callbacks=[At(hook, number, lambda run: run.request_pause())], **given)
    else:
        with pytest.raises(CrashError):
            fit("part", callbacks=[At(hook, number, crash)], **given)
    fit("part", resume=True, callbacks=[At("on_step_end", 7, lambda run: run.request_pause())], **given)
    part = fit("part", resume=True, **given)
    assert part.status == "completed"
    assert fit.weights("part") == fit.weights("whole")
    for one, other in zip(part.heads, whole.heads, strict=True):
        assert (one.best_epoch, one.val_accuracy) == (other.best_epoch, other.val_accuracy)


@pytest.mark.parametrize("name", ["patience", "stop_when"])
def test_without_a_validation_set_there_is_nothing_to_look_at(fit: Fit, name: str) -> None:
    value: Any = {"patience": 2, "stop_when": "stalled"}[name]
    with pytest.raises(DataError, match=f"{name} = .*: there is no validation set"):
        fit("run", val=None, **{name: value})


@pytest.mark.parametrize(
    ("accuracies", "samples", "stalled"),
    [
        ([0.5, 0.5], 100, False),  # two have to gain nothing, on one before
        ([0.5, 0.5, 0.5], 100, True),
        ([0.5, 0.54, 0.549], 100, True),  # the error of 0.5 is 0.05
        ([0.5, 0.54, 0.551], 100, False),
        ([0.5, 0.54, 0.549], 10_000, False),
        ([0.9, 0.5, 0.7, 0.8], 100, True),
        ([1.0, 1.0, 1.0], 9, True),
    ],
)
def test_what_counts_as_stalled(accuracies: list[float], samples: int, stalled: bool) -> None:
    assert has_stalled(accuracies, samples) is stalled


@pytest.fixture
def stopped(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.setattr(
        scheduler, "has_stalled", lambda accuracies, samples, metric: len(accuracies) == 2 and samples == 9
    )
    return fit("run", stop_when="stalled")


def test_a_run_ends_where_deeper_modules_do_not_help(fit: Fit, stopped: Report) -> None:
    assert (stopped.status, stopped.stopped_behind) == ("completed", 1)
    assert [module.val_accuracy is not None for module in stopped.heads] == [True, True, False, False]
    assert stopped.accuracy.best_head in (0, 1)
    assert (stopped.accuracy.last_head_val, stopped.accuracy.drop) != (None, None)
    assert stopped.seconds.per_epoch is not None
    assert not (fit.path("run") / "model.safetensors").exists()
    text = "\n".join("".join(span.text for span in line) for line in report_lines(stopped, 400))
    assert "not trained: module 2, the network's own classifier" in text
    assert "blocks.2 (not trained)" in text
    assert "own classifier nan" not in (accuracy_line(stopped) or "")
    assert gain_line(stopped) is not None
    assert "two modules in a row" in to_html(stopped)
    tensors = load_file(export_run(fit.path("run"), format="state-dict", head="best", output=fit.path("m")))
    assert not [name for name in tensors if name.startswith(("blocks.2", "classifier"))]
    with pytest.raises(UsageError, match="own classifier was not trained: the run stopped behind module 1"):
        export_run(fit.path("run"), format="state-dict", head="last", output=fit.path("n"))


def test_a_stopped_run_is_resumed_to_itself(fit: Fit, stopped: Report) -> None:
    again = fit("run", stop_when="stalled", resume=True)
    assert (again.status, again.stopped_behind, again.accuracy) == ("completed", 1, stopped.accuracy)


def test_a_stopped_run_gives_an_app_the_network_up_to_its_head(fit: Fit, stopped: Report) -> None:
    trainer = Trainer(net(), config(stop_when="stalled"), run_dir=fit.path("run"))
    trainer.fit(samples(26), samples(9, 1), samples(9, 2), resume=True)
    images, labels = samples(9, 2).tensors
    with torch.no_grad():
        right = float((trainer.export("best")(images).argmax(1) == labels).double().mean())
    assert right == stopped.accuracy.test


class Crash(Callback):
    """Behind the module at which the run stops, in front of its report."""

    def on_lap_end(self, run: RunState) -> None:
        raise CrashError


def test_a_stopped_run_of_named_data_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "has_stalled", lambda accuracies, samples, metric: len(accuracies) == 1)
    settings: dict[str, Any] = {"budget": "64GB", "modules": 3, "epochs": 1, "threads": 1, "stop_when": "stalled"}
    work = Workload(model="resnet-preact-3x4", data="synthetic:1x8x8:3:60")
    job = Job(work, TrainConfig(**settings), tmp_path / "run", baseline="skip")
    with pytest.raises(CrashError):
        train_job(job, (Crash(),))
    report = resume_job(tmp_path / "run")
    assert (report.status, report.stopped_behind) == ("completed", 0)
    found = evaluate_run(tmp_path / "run")
    assert (found["head"], found["accuracy"], found["matches_report"]) == (0, report.accuracy.test, True)
    assert evaluate_run(tmp_path / "run", head="ensemble")["heads"] == found["heads"]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"patience": 0}, "patience = 0"),
        ({"stop_when": "bored"}, "stop_when = 'bored'"),
        ({"patience": 2, "schedule": "parallel"}, "patience = 2: in the parallel schedule"),
        ({"stop_when": "stalled", "schedule": "parallel"}, "stop_when = 'stalled': in the parallel schedule"),
        ({"stop_when": "stalled", "schedule": "multi-lap", "laps": 2}, "stop_when = 'stalled': with laps = 2"),
        ({"stop_when": "stalled", "modules": 1}, "stop_when = 'stalled': with modules = 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        TrainConfig(**settings)
