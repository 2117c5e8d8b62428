"""A checkpoint that the disk has damaged: the one before, or the module's start, and the same weights in the end."""

from pathlib import Path
from typing import Any

import pytest

from ondevice_trgl import Callback, RunState
from ondevice_trgl.errors import DamagedFileError
from ondevice_trgl.model.header import read_header
from ondevice_trgl.report.memory import memory_notes
from tests.run.conftest import Fit
from tests.run.test_resume import Whole
from tests.run.test_taken_up import events

OFTEN: dict[str, Any] = {"checkpoint_every": "1steps"}


class PauseAt(Callback):
    """Pauses behind the `step`-th step of all."""

    def __init__(self, step: int) -> None:
        self.left = step

    def on_step_end(self, run: RunState) -> None:
        self.left -= 1
        if not self.left:
            run.request_pause()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def flip_value(path: Path) -> None:
    flip(path, read_header(path)[2] + 5)


def flip_header(path: Path) -> None:
    flip(path, path.read_bytes().index(b'\\"step\\": ') + len(b'\\"step\\": '))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "settings", "step"),
    [
        (flip_value, {}, 10),
        (flip_header, {}, 10),
        (cut, {}, 7),
        (flip_value, {"schedule": "multi-lap", "laps": 2}, 32),
        (cut, {"schedule": "parallel"}, 4),
    ],
)
def test_of_a_damaged_newest_checkpoint_the_one_before_is_taken(
    damage: Any, settings: dict[str, Any], step: int, fit: Fit, whole: Whole
) -> None:
    assert fit("part", callbacks=[PauseAt(step)], **settings, **OFTEN).status == "paused"
    files = sorted((fit.path("part") / "modules").glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    damage(files[-1])
    first = step == 7  # of a module: it was saved once
    report = fit("part", resume=True, **settings, **OFTEN)
    assert report.status == "completed"
    assert any("was damaged on disk: it went on from" in note for note in memory_notes(report))
    mended = events(fit, "mended")
    assert {event["to"] for event in mended} == {"its start" if first else "the checkpoint before"}
    assert len(mended) == (3 if settings.get("schedule") == "parallel" else 1)
    assert fit.weights("part") == whole(**settings, **OFTEN)
    assert not list((fit.path("part") / "modules").glob("*.before"))


def test_a_damaged_module_that_was_done_long_ago_is_trained_again(fit: Fit, whole: Whole) -> None:
    fit("part", callbacks=[PauseAt(16)], **OFTEN)
    flip_value(fit.path("part") / "modules" / "000.safetensors")
    fit("part", resume=True, **OFTEN)
    assert [(event["module"], event["to"]) for event in events(fit, "mended")] == [(0, "its start")]
    assert fit.weights("part") == whole(**OFTEN)


def test_with_patience_the_module_starts_again(fit: Fit, whole: Whole) -> None:
    given: dict[str, Any] = {"patience": 1, **OFTEN}
    fit("part", callbacks=[PauseAt(5)], **given)
    flip_value(fit.path("part") / "modules" / "000.safetensors")
    fit("part", resume=True, **given)
    assert [event["to"] for event in events(fit, "mended")] == ["its start"]
    assert fit.weights("part") == whole(**given)


def test_in_a_later_lap_what_is_damaged_and_has_none_before_is_told(fit: Fit) -> None:
    given: dict[str, Any] = {"schedule": "multi-lap", "laps": 2, **OFTEN}
    fit("part", callbacks=[PauseAt(38)], **given)
    path = fit.path("part") / "modules" / "000.safetensors"
    flip_value(path)
    with pytest.raises(DamagedFileError, match=r"000\.safetensors is damaged, and nothing that was saved before it"):
        fit("part", resume=True, **given)
    flip_value(path)
    assert fit("part", resume=True, **given).status == "completed"  # nothing was touched


def test_what_lies_among_the_modules_and_is_not_ours_is_left_alone(fit: Fit, whole: Whole) -> None:
    fit("part", callbacks=[PauseAt(10)], **OFTEN)
    modules = fit.path("part") / "modules"
    path = modules / "000.safetensors"
    data = path.read_bytes()
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedFileError, match="is a folder, expected a file"):
        fit("part", resume=True, **OFTEN)
    path.rmdir()
    path.write_bytes(data)
    for name in ("x.before", "notes.pending", "7.before"):
        (modules / name).write_bytes(b"mine")
    fit("part", resume=True, **OFTEN)
    assert fit.weights("part") == whole(**OFTEN)
    assert {"x.before", "notes.pending", "7.before"} <= {path.name for path in modules.iterdir()}
