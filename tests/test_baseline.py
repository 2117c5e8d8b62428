"""End-to-end training measured in a process of its own; what could not be measured is never a number."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ondevice_trgl import baseline
from ondevice_trgl.baseline import measure_baseline
from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.errors import DataError
from ondevice_trgl.report.model import BaselineReport

WORKLOAD = Workload(model="resnet-preact-2x4", data="synthetic:1x8x8:3:20")
CONFIG = TrainConfig(budget="64GB", threads=1)


def measure(tmp_path: Path, name: str = "e2e", workload: Workload = WORKLOAD) -> BaselineReport:
    return measure_baseline(name, workload, CONFIG, batch_size=8, scratch_dir=tmp_path)


@pytest.fixture
def find_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The child finds this package and the models in `tmp_path`."""
    here = str(Path(__file__).resolve().parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, str(tmp_path)]))


@pytest.mark.usefixtures("find_package")
def test_it_is_measured_in_another_process(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    report = measure(tmp_path)
    assert (report.status, report.batch_size, report.micro_batch_size, report.reason) == ("measured", 8, 8, "")
    assert report.measured_peak_bytes is not None
    assert report.floor_bytes is not None
    assert report.measured_peak_bytes >= report.floor_bytes > 50_000_000
    assert report.seconds_per_epoch is not None
    assert report.seconds_per_epoch > 0
    assert report.timed_steps is not None
    assert report.timed_steps >= 3
    assert torch.equal(torch.get_rng_state(), before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("find_package")
def test_a_model_that_is_refused_memory_in_the_child(tmp_path: Path) -> None:
    (tmp_path / "failing_model.py").write_text("def make():\n    raise MemoryError('no more')\n", encoding="utf-8")
    report = measure(tmp_path, workload=Workload(model="failing_model:make", data="synthetic:1x8x8:3:20"))
    assert report.status == "did_not_fit"
    assert (report.measured_peak_bytes, report.seconds_per_epoch) == (None, None)
    assert "no more" in report.reason


def test_an_error_of_the_child_is_the_reason_for_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise DataError("no such file", hint="look elsewhere")

    monkeypatch.setattr(baseline, "ask", fail)
    report = measure(tmp_path)
    assert (report.status, report.reason) == ("skipped", "no such file")
    assert (report.measured_peak_bytes, report.seconds_per_epoch) == (None, None)


@pytest.mark.parametrize(
    ("code", "stderr", "status", "reason"),
    [
        (-signal.SIGKILL, "", "did_not_fit", "killed by the system"),
        (1, "noise\nDataError: absent\n", "skipped", "DataError: absent"),
        (-signal.SIGINT, "", "skipped", "interrupted"),
        (-signal.SIGSEGV, "", "skipped", "ended with status -11"),
    ],
)
@pytest.mark.parametrize("name", ["e2e", "e2e_checkpoint"])
def test_a_child_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, stderr: str, status: str, reason: str
) -> None:
    requests: list[dict[str, Any]] = []

    def run(command: list[str], *, input: str, **options: Any) -> subprocess.CompletedProcess[str]:
        assert command == [sys.executable, "-m", "ondevice_trgl.device.lean", "ondevice_trgl.baseline"]
        requests.append(json.loads(input))
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    report = measure(tmp_path, name)
    assert (report.status, report.measured_peak_bytes, report.seconds_per_epoch) == (status, None, None)
    assert reason in report.reason
    assert requests[0]["name"] == name
    assert TrainConfig(**requests[0]["config"]) == CONFIG


def refused_with(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "MemoryError"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nmore"), "[enforce fail] "),
        (RuntimeError("could not create a primitive"), "could not create a primitive"),
        (RuntimeError("CUDA out of memory."), "CUDA out of memory."),
        (refused_with(DataError("make() failed"), MemoryError("no more")), "make() failed"),
        (RuntimeError("shapes do not match"), None),
        (DataError("no such file"), None),
        (refused_with(DataError("make() failed"), ValueError("a bug")), None),
    ],
)
def test_only_a_want_of_memory_is_called_so(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str | None
) -> None:
    def fail(request: dict[str, Any]) -> BaselineReport:
        raise error

    monkeypatch.setattr(baseline, "_measure", fail)
    request = {"allocator": "system", "batch_size": 8}
    if reason is None:
        with pytest.raises(type(error)) as caught:
            baseline._work(request)
        assert caught.value is error
        return
    report = BaselineReport(**json.loads(json.dumps(baseline._work(request))))
    assert (report.status, report.batch_size, report.micro_batch_size) == ("did_not_fit", 8, 8)
    assert (report.measured_peak_bytes, report.seconds_per_epoch) == (None, None)
    assert report.reason.startswith(reason)
    assert len(report.reason.splitlines()) == 1


@pytest.mark.parametrize("name", ["e2e", "e2e_checkpoint"])
def test_the_work_is_the_same_and_ends_with_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    steps: list[int] = []
    validated: list[int] = []
    monkeypatch.setattr(
        baseline, "_step", lambda forward, optimizer, z, labels, config: steps.append(forward(z).shape[0])
    )
    monkeypatch.setattr(baseline, "_validate", lambda model, labels, *rest: validated.append(len(labels)))
    threads, rng = torch.get_num_threads(), torch.get_rng_state()
    try:
        report = baseline._measure(
            {
                "name": name,
                "workload": WORKLOAD.to_dict(),
                "config": CONFIG.to_dict(),
                "batch_size": 8,
                "scratch_dir": str(tmp_path),
            }
        )
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(rng)
    assert set(steps) == {8}
    assert report.timed_steps == len(steps) - 1
    assert len(validated) == 1
