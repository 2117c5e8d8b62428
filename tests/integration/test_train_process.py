"""`trgl-device` as a user runs it: a real process on real images, from the budget to the trained model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ondevice_trgl.jobs import resume_job
from tests.report_schema import SCHEMA, SECONDS, WHOLE, conforms

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ("--data", "digits", "--train-limit", "120", "--epochs", "1", "--modules", "2", "--threads", "1")
Done = subprocess.CompletedProcess[str]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ondevice_trgl", *arguments]


def trgl(*arguments: str, cwd: Path) -> Done:
    return subprocess.run(
        command(*arguments), env=environment(), cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )


def record(done: Done) -> Any:
    """Stdout, which is one JSON object and nothing else."""
    assert "Traceback" not in done.stderr, done.stderr
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """Training within a budget that nothing fits."""
    folder = tmp_path_factory.mktemp("train")
    return folder, trgl("train", "-b", "20MB", *SMALL, "--json", "-o", "run", cwd=folder)


def test_a_budget_below_the_floor_is_refused_with_one_that_works(refused: tuple[Path, Done]) -> None:
    folder, done = refused
    assert done.returncode == 3
    refusal = record(done)
    assert (refusal["status"], refusal["budget_bytes"]) == ("infeasible", 20_000_000)
    least = refusal["smallest_feasible_budget_bytes"]
    assert type(least) is int
    assert f"{least // 1_000_000}MB" in done.stderr
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def trained(refused: tuple[Path, Done]) -> tuple[Path, Done]:
    """A run within the budget that the refusal named, with both baselines measured."""
    folder, done = refused
    least = str(json.loads(done.stdout)["smallest_feasible_budget_bytes"])
    return folder, trgl("train", "-b", least, *SMALL, "--baseline", "measure", "--json", "-o", "run", cwd=folder)


def test_training_within_the_budget_that_was_named_ends_with_one_json_object_that_is_the_report(
    refused: tuple[Path, Done], trained: tuple[Path, Done]
) -> None:
    folder, done = trained
    report = record(done)
    assert report["status"] == "completed"
    assert report == json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    measured = dict(SCHEMA["baselines"]["e2e"], measured_peak_bytes=WHOLE, seconds_per_epoch=SECONDS)
    schema = {**SCHEMA, "baselines": {"e2e": measured, "e2e_checkpoint": measured}}
    schema["savings"] = dict.fromkeys(SCHEMA["savings"], float)
    assert conforms(report, schema) == []
    assert report["budget_bytes"] == record(refused[1])["smallest_feasible_budget_bytes"]
    assert done.returncode == (4 if report["measured_peak_bytes"] > report["budget_bytes"] else 0)
    assert report["measured_peak_bytes"] <= 1.05 * report["budget_bytes"]  # it is the least there is
    for name in ("e2e", "e2e_checkpoint"):
        baseline = report["baselines"][name]
        assert baseline["status"] == "measured", baseline
        assert baseline["batch_size"] == report["plan"]["batch_size"]
        saving = 1 - report["measured_peak_bytes"] / baseline["measured_peak_bytes"]
        assert report["savings"][f"vs_{name}"] == pytest.approx(saving)
    assert report["seconds"]["total"] > 0
    assert {path.name for path in folder.iterdir()} == {"run"}


def test_evaluate_reproduces_the_accuracy(trained: tuple[Path, Done]) -> None:
    folder, done = trained
    result = record(trgl("evaluate", "run", "--json", cwd=folder))
    assert result["matches_report"] is True
    assert result["accuracy"] == record(done)["accuracy"]["test"]
    assert result["measured_peak_bytes"] <= result["budget_bytes"] == record(done)["budget_bytes"]
    assert {path.name for path in (folder / "run").iterdir() if path.name.startswith((".", "cache"))} == set()


def test_export_copies_the_trained_weights(trained: tuple[Path, Done]) -> None:
    folder, _ = trained
    result = record(trgl("export", "run", "--head", "last", "-o", "../weights.safetensors", "--json", cwd=folder))
    written = folder.parent / "weights.safetensors"
    assert (result["path"], result["bytes"]) == ("../weights.safetensors", written.stat().st_size)
    assert written.read_bytes() == (folder / "run" / "model.safetensors").read_bytes()


def test_a_foreign_folder_is_not_replaced_even_by_force(tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    done = trgl("train", "-b", "2GB", *SMALL, "-o", ".", "--force", "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert record(done)["error"] == "RunDirError"
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-b", "much"), ["budget = 'much'", "600MB"]),
        (("-b", "0"), ["budget = '0'", "more than zero"]),
        (("-b", "-1GB"), ["budget = '-1GB'", "more than zero"]),
        (("-b", "2GB", "-p", "raspberry"), ["unknown", "'raspberry'", "valid:"]),
        (("-b", "2GB", "-c", "three.toml"), ["3 faults", "epochs", "optimiser", "'optimizer'", "tau"]),
    ],
)
def test_what_the_user_wrote_wrong(tmp_path: Path, arguments: Sequence[str], words: list[str]) -> None:
    (tmp_path / "three.toml").write_text('epochs = 0\noptimiser = "sgd"\ntau = -1.0\n', encoding="utf-8")
    done = trgl("train", *arguments, "--baseline", "skip", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()
    assert [word for word in words if word not in done.stderr] == []
    assert "Traceback" not in done.stderr


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path: Path) -> None:
    done = trgl("train", "-b", "2GB", "--model", "resnet-smal", "--json", cwd=tmp_path)
    assert done.returncode == 2
    message = record(done)["message"]
    assert "unknown model 'resnet-smal'; did you mean resnet-small" in message
    assert "valid: " in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_compare_measures_every_row_in_a_process_of_its_own(tmp_path: Path) -> None:
    flags = ("-b", "2GB", *SMALL, "--accumulate", "5", "-o", "kept", "--json")
    done = trgl("compare", *flags, cwd=tmp_path)
    result = record(done)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["plain", "e2e", "e2e_accumulate", "e2e_checkpoint", "trgl 2GB"]
    for row in rows.values():
        assert (row["status"], row["reason"], len(row["runs"])) == ("measured", "", 1), row
        assert row["peak_bytes"] > row["floor_bytes"] > 50_000_000
        assert row["above_floor_bytes"] == row["peak_bytes"] - row["floor_bytes"]
        assert row["seconds_per_epoch"] > 0
    assert [row["micro_batch_size"] for row in rows.values()][:4] == [32, 32, 8, 32]
    assert "cannot be cut into 5" in rows["e2e_accumulate"]["note"]
    # what a script loads that a lean process does not: torch.optim alone takes 70 MB
    assert rows["plain"]["floor_bytes"] > rows["e2e"]["floor_bytes"] + 50_000_000
    kept = json.loads((tmp_path / "kept" / "trgl-2GB" / "report.json").read_text(encoding="utf-8"))
    trgl_row = rows["trgl 2GB"]
    assert trgl_row["peak_bytes"] == kept["measured_peak_bytes"] <= 2 * 10**9
    assert trgl_row["seconds_per_epoch"] == pytest.approx(kept["seconds"]["per_epoch"])
    assert (trgl_row["modules"], trgl_row["predicted_peak_bytes"]) == (2, kept["predicted_peak_bytes"])
    assert result["environment"] == kept["environment"]
    assert {path.name for path in tmp_path.iterdir()} == {"kept"}


def stopped_in_training(number: signal.Signals, cwd: Path, *arguments: str) -> Done:
    """Run a command until a module has started, then send the signal."""
    events = cwd / "run" / "events.jsonl"
    before = events.stat().st_size if events.exists() else 0
    process = subprocess.Popen(
        command(*arguments), env=environment(), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (events.exists() and events.stat().st_size > before) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=300)
    return Done(process.args, process.returncode, out, err)


@pytest.mark.long
def test_a_run_that_is_stopped_twice_has_its_checkpoints_and_resumes_to_the_end(tmp_path: Path) -> None:
    output = ("--json", "--progress", "none")
    long = (
        "train",
        "-b",
        "2GB",
        *SMALL,
        "--epochs",
        "30",
        "--classifier-epochs",
        "2",
        "--baseline",
        "skip",
        "-o",
        "run",
        *output,
    )
    done = stopped_in_training(signal.SIGTERM, tmp_path, *long)
    assert done.returncode == 143, done.stderr
    assert record(done)["status"] == "paused"
    done = stopped_in_training(signal.SIGINT, tmp_path, "resume", "run", *output)
    assert done.returncode == 130, done.stderr
    assert record(done)["status"] == "paused"
    report = resume_job(tmp_path / "run")
    assert report.status == "completed"
    assert report.accuracy.test is not None
    assert report.accuracy.test > 0.5  # ten digits: chance is 0.1
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert not (tmp_path / "run" / "cache").exists()


@pytest.mark.parametrize("name", ["train", "compare"])
def test_a_signal_before_anything_is_trained_leaves_nothing(tmp_path: Path, name: str) -> None:
    process = subprocess.Popen(
        command(name, "-b", "2GB", *SMALL, "--json", "-o", "run"),
        env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err.splitlines()[-1]) == (143, "", "stopped")
    assert list(tmp_path.iterdir()) == []
