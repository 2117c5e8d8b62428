"""Bytes that a run writes: predicted, counted where they are written, and kept across sittings."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ondevice_trgl import Report
from ondevice_trgl.model.header import read_header
from ondevice_trgl.report.wear import disk_line
from tests.run.conftest import At, CrashError, Fit, crash
from tests.run.test_resume import STEPS, pause

pytestmark = pytest.mark.usefixtures("code_pages_kept")

ROWS, WIDE, NARROW = 26 + 9 + 9, 6 * 6 * 6, 6
"""Samples, and values of the boundaries behind the two modules and in front of the classifier."""


def headers(folder: Path) -> int:
    """Bytes of files of tensors that are not tensors."""
    return sum(read_header(path)[2] for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_dtype": "fp16"},
        {"cache": "memory"},
        {"schedule": "multi-lap", "laps": 2},
        {"schedule": "parallel"},
        {"optimizer": "adamw", "schedule": "multi-lap", "laps": 2},
    ],
    ids=str,
)
def test_what_is_written_is_what_was_predicted(settings: dict[str, Any], fit: Fit) -> None:
    report = fit("run", **settings)
    predicted, written = report.predicted_write_bytes, report.written_bytes
    assert predicted is not None
    assert written is not None
    # positions of modules, and predictions of the validation set, which an ensemble is made of, are what is not in it
    laps, extra = settings.get("laps", 1), 4 * 3 * 3 * 9
    assert 0 <= written - predicted <= laps * (headers(fit.path("run")) + 8000 + extra)
    cached = 4 * ROWS * (2 * WIDE + NARROW) * laps
    assert predicted > (0 if settings.get("cache") == "memory" else cached // 2 if "cache_dtype" in settings else 0)


def test_boundaries_are_counted_as_they_are_kept(fit: Fit) -> None:
    on_disk, in_memory = fit("disk"), fit("memory", cache="memory")
    assert on_disk.written_bytes is not None
    assert in_memory.written_bytes is not None
    boundaries = sum(module.cache_write_bytes or 0 for module in on_disk.modules)
    assert abs(on_disk.written_bytes - in_memory.written_bytes - boundaries) < 500  # a record differs by its digits
    assert boundaries >= 4 * ROWS * 2 * WIDE


@pytest.mark.parametrize("how", [pause, crash])
def test_sittings_add_up(how: Any, fit: Fit) -> None:
    stop = [At("on_step_end", STEPS - 2, how)]
    if how is crash:
        with pytest.raises(CrashError):
            fit("part", callbacks=stop)
    else:
        fit("part", callbacks=stop)
    first = json.loads((fit.path("part") / "report.json").read_text())["written_bytes"]
    (fit.path("part") / "report.json").unlink()  # as where it was killed
    report, whole = fit("part", resume=True), fit("whole")
    assert report.written_bytes is not None
    assert whole.written_bytes is not None
    assert first < report.written_bytes
    assert report.written_bytes >= whole.written_bytes - 1000


def test_best_epochs_are_written_too(fit: Fit) -> None:
    usual, patient = fit("usual"), fit("patient", patience=2)
    assert usual.written_bytes is not None
    assert patient.written_bytes is not None
    assert patient.written_bytes > usual.written_bytes + 4 * 6 * 6 * 9


def test_what_optimizers_have_on_disk_is_counted(tmp_path: Path) -> None:
    import torch
    from torch import nn

    from ondevice_trgl.trgl.optim import Optimizer

    parameter, sizes = nn.Parameter(torch.ones(300, 300)), list[int]()
    optimizer = Optimizer("sgd", {"p": parameter}, momentum=0.9)
    optimizer.wrote = sizes.append
    optimizer.spill(tmp_path)
    sizes.clear()  # the state that it begins with
    parameter.sum().backward()
    optimizer.step(0.1)
    optimizer.close()
    assert sum(sizes) == 2 * 4 * 300 * 300  # gradient and momentum


def planned(report: Report, **changes: Any) -> str | None:
    return disk_line(dataclasses.replace(report, **changes))


def test_in_words(fit: Fit) -> None:
    report = dataclasses.replace(fit("run"), predicted_write_bytes=3 << 20, written_bytes=4 << 20)
    assert planned(report) == "4.0 MiB written, 3.0 MiB predicted without checkpoints in mid-training and resumes"
    assert planned(report, flash_endurance_bytes=(4 << 20) * 1000) == (
        "4.0 MiB written, 3.0 MiB predicted without checkpoints in mid-training and resumes; "
        "one run is 0.1% of the 0.00419 TB that the flash memory stands"
    )
    assert planned(report, written_bytes=None) == "3.0 MiB will be written, checkpoints in mid-training aside"
    assert planned(report, written_bytes=None, predicted_write_bytes=None) is None
    assert planned(report, predicted_write_bytes=None) == "4.0 MiB written"
