"""The unit and the wrapper of examples/systemd: begun, stopped, gone on with, completed; each exit status as stated."""

import configparser
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ondevice_trgl.errors import BudgetInfeasibleError, UsageError
from ondevice_trgl.units import parse_size

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "examples" / "systemd"
WRAPPER, UNIT = FOLDER / "train-or-resume.sh", FOLDER / "trgl-train.service"
SMALL = ("--model", "resnet-preact-2x1x4", "--data", "digits", "--train-limit", "120", "--modules", "2")
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)  # strict: nothing is said twice
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT, encoding="utf-8")
    return parser


def test_the_kernels_limit_is_above_the_budget(unit: configparser.ConfigParser) -> None:
    service = unit["Service"]
    _, run, budget, *flags = shlex.split(service["ExecStart"])
    assert run.startswith(f"%S/{service['StateDirectory']}/")
    limit = parse_size(service["MemoryMax"] + "iB")  # systemd counts in powers of 1024
    assert 1.05 * parse_size(budget) < limit < 1.5 * parse_size(budget)
    assert "--run-dir" not in flags


def test_what_ends_the_same_way_again_is_not_restarted(unit: configparser.ConfigParser) -> None:
    service = unit["Service"]
    assert service["Restart"] == "on-failure"
    statuses = {int(status) for status in service["RestartPreventExitStatus"].split()}
    assert statuses == {UsageError.exit_code, BudgetInfeasibleError.exit_code} == {2, 3}
    assert (service["KillSignal"], service["SuccessExitStatus"]) == ("SIGTERM", str(128 + signal.SIGTERM))
    assert service["ProtectSystem"] == "strict"
    assert "MemoryDenyWriteExecute" not in service


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not installed here")
    here = tmp_path / UNIT.name
    here.write_text(UNIT.read_text(encoding="utf-8").replace("/opt/trgl/bin/train", f"{FOLDER}/train"), "utf-8")
    done = subprocess.run([analyze, "verify", str(here)], capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if UNIT.name in line]
    assert (done.returncode, said) == (0, []), done.stderr


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    command = tmp_path / "trgl-device"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ondevice_trgl "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "TRGL_DEVICE": str(command)}


def wrapped(folder: Path, environment: dict[str, str], *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(WRAPPER), *arguments], cwd=folder, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: "subprocess.Popen[str]") -> Done:
    out, err = process.communicate(timeout=300)
    return Done(process.args, process.returncode, out, err)


@pytest.mark.long
def test_a_run_is_begun_stopped_gone_on_with_and_left_alone(tmp_path: Path, environment: dict[str, str]) -> None:
    arguments = (
        "run",
        "2GB",
        *SMALL,
        "--epochs",
        "30",
        "--classifier-epochs",
        "1",
        "--threads",
        "1",
        "--baseline",
        "skip",
    )
    process = wrapped(tmp_path, environment, *arguments)
    events = tmp_path / "run" / "events.jsonl"
    while not events.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stopped = ended(process)
    assert stopped.returncode == 143, stopped.stderr
    report = tmp_path / "run" / "report.json"
    assert json.loads(report.read_text(encoding="utf-8"))["status"] == "paused"
    made = (tmp_path / "run" / "plan.json").stat().st_mtime_ns

    done = ended(wrapped(tmp_path, environment, *arguments))
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text(encoding="utf-8"))["status"] == "completed"
    assert (tmp_path / "run" / "plan.json").stat().st_mtime_ns == made  # resumed, not begun anew

    left = report.stat().st_mtime_ns
    environment["TRGL_DEVICE"] = "/bin/false"  # what is completed needs nobody
    again = ended(wrapped(tmp_path, environment, *arguments))
    assert (again.returncode, again.stdout, again.stderr) == (0, "run is completed\n", "")
    assert report.stat().st_mtime_ns == left


def test_what_is_wrong_in_the_command_ends_with_2(
    tmp_path: Path, environment: dict[str, str], unit: configparser.ConfigParser
) -> None:
    done = ended(wrapped(tmp_path, environment, "run"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage" in done.stderr
    flags = shlex.split(unit["Service"]["ExecStart"])[3:]  # which are known: the budget is all that is wrong
    done = ended(wrapped(tmp_path, environment, "run", "much", *flags))
    assert done.returncode == 2
    assert "1 fault" in done.stderr
    assert "'much'" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("status", [0, 1, 3, 4])
def test_the_exit_status_is_that_of_the_command(tmp_path: Path, environment: dict[str, str], status: int) -> None:
    Path(environment["TRGL_DEVICE"]).write_text(f'#!/bin/sh\necho "$@"\nexit {status}\n', encoding="utf-8")
    begun = ended(wrapped(tmp_path, environment, "a run", "600MB", "--epochs", "1"))
    assert (begun.returncode, begun.stderr) == (status, "")
    assert begun.stdout == "train --run-dir a run --budget 600MB --force --progress plain --epochs 1\n"
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "config.json").touch()
    resumed = ended(wrapped(tmp_path, environment, "a run", "600MB", "--epochs", "1"))
    assert (resumed.returncode, resumed.stdout) == (status, "resume a run --budget 600MB --progress plain\n")
