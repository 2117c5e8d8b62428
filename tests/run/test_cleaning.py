"""Runs on disk: how they stand, what they take; cleaned, they go on to the same bytes, and nobody's work is touched."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ondevice_trgl.errors import RunDirError
from ondevice_trgl.model import module_files
from ondevice_trgl.run import cleaning
from ondevice_trgl.run.cleaning import clean, clean_scratch
from ondevice_trgl.run.inventory import Run, is_run, look_at, runs_below
from ondevice_trgl.run.lock import held, is_held
from tests.run.conftest import At, CrashError, Fit, crash
from tests.run.test_resume import STEPS, Whole, pause

pytestmark = pytest.mark.usefixtures("code_pages_kept")


def only(folder: Path) -> Run:
    (run,) = runs_below(folder)
    return run


@pytest.fixture
def stopped(fit: Fit) -> Fit:
    """The run "part", paused with a boundary on disk."""
    assert fit("part", callbacks=[At("on_step_end", STEPS - 2, pause)]).status == "paused"
    return fit


@pytest.fixture
def another(tmp_path: Path) -> Iterator[Path]:
    """A folder that another process holds."""
    place = tmp_path / "another"
    place.mkdir()
    source = (
        "import sys; from pathlib import Path; from ondevice_trgl.run.lock import held\n"
        "with held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", source, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield place
        process.kill()


def test_a_paused_run_is_listed_with_what_it_takes(stopped: Fit) -> None:
    run = only(stopped.folder)
    cache = sum(path.stat().st_size for path in (run.path / "cache").iterdir())
    assert (run.path, run.status, run.cache_bytes) == (stopped.path("part"), "paused", cache)
    assert cache > 26 * 6 * 6 * 6 * 4
    assert run.weights_bytes >= sum(path.stat().st_size for path in (run.path / "modules").iterdir())
    assert run.total_bytes == sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    assert (run.model, run.data, run.budget_bytes) == (None, None, 64_000_000_000)
    assert run.to_dict()["last_written"].endswith("+00:00")


def test_a_cleaned_run_goes_on_to_the_same_weights(stopped: Fit, whole: Whole) -> None:
    run = only(stopped.folder)
    modules = run.path / "modules"
    left = [run.path / ".plan.json.tmp", modules / ".001.safetensors.tmp", modules / "002.pending"]
    for path in left:
        path.write_bytes(b"x" * 100)
    (run.path / "cache" / "mending").mkdir()
    (run.path / ".trgl-dead").mkdir()
    (run.path / "mine.txt").write_text("kept")
    assert clean(run) == run.cache_bytes + 300
    assert not [path for path in (*left, run.path / "cache", run.path / ".trgl-dead") if path.exists()]
    assert (run.path / "mine.txt").exists()
    assert only(stopped.folder).cache_bytes == 0
    assert stopped("part", resume=True).status == "completed"
    assert stopped.weights("part") == whole()
    assert only(stopped.folder).status == "completed"


def test_the_cache_of_a_run_elsewhere_is_found_and_freed(fit: Fit, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "of others").mkdir(parents=True)
    with pytest.raises(CrashError):
        fit("part", callbacks=[At("on_step_end", STEPS - 2, crash)], cache_dir=str(elsewhere))
    run = look_at(fit.path("part"))
    assert run.status == "failed"
    assert run.cache_bytes == sum(path.stat().st_size for path in elsewhere.rglob("*") if path.is_file()) > 0
    assert clean(run) == run.cache_bytes
    assert [path.name for path in elsewhere.iterdir()] == ["of others"]


def test_what_is_pending_and_committed_is_kept(stopped: Fit) -> None:
    assert cleaning.COMMITTED == module_files._COMMITTED
    modules = stopped.path("part") / "modules"
    for name in ("002.pending", cleaning.COMMITTED):
        (modules / name).write_bytes(b"x")
    clean(only(stopped.folder))
    assert (modules / "002.pending").exists()


def test_everything_is_what_is_of_the_run(stopped: Fit) -> None:
    path = stopped.path("part")
    (path / "mine.txt").write_text("kept")
    run = look_at(path)
    assert clean(run, everything=True) == run.total_bytes - len("kept")
    assert [entry.name for entry in path.iterdir()] == ["mine.txt"]
    assert runs_below(stopped.folder) == ()


def test_a_cache_that_is_a_link_is_refused_and_loses_nothing(stopped: Fit, tmp_path: Path) -> None:
    cache, target = stopped.path("part") / "cache", tmp_path / "disk"
    cache.rename(target)
    cache.symlink_to(target)
    (target / "photo.jpg").write_bytes(b"x")
    before = sorted(target.iterdir())
    for everything in (False, True):
        with pytest.raises(RunDirError, match="cache is a link"):
            clean(look_at(stopped.path("part")), everything=everything)
    assert sorted(target.iterdir()) == before
    assert cache.is_symlink()


def test_a_run_of_a_newer_version_is_listed_and_left_alone(stopped: Fit) -> None:
    run = stopped.path("part")
    record = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps({**record, "format": 3}), encoding="utf-8")
    before = sorted(run.rglob("*"))
    assert only(stopped.folder).status == "newer"
    for everything in (False, True):
        with pytest.raises(RunDirError, match="newer version"):
            clean(look_at(run), everything=everything)
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "config": 3}'])
def test_a_damaged_record_is_still_a_run(text: str, stopped: Fit) -> None:
    (stopped.path("part") / "config.json").write_text(text)
    assert only(stopped.folder).status == "damaged"


def test_a_run_without_a_report_was_killed(stopped: Fit) -> None:
    (stopped.path("part") / "report.json").unlink()
    assert only(stopped.folder).status == "killed"


def test_the_config_of_another_program_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    assert not is_run(tmp_path)
    assert runs_below(tmp_path) == ()


def test_no_folder_no_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="does not exist"):
        runs_below(tmp_path / "none")
    with pytest.raises(RunDirError, match="is a file"):
        runs_below(tmp_path / "file")


def test_nobody_cleans_resumes_or_replaces_what_another_process_trains(stopped: Fit, another: Path) -> None:
    for entry in stopped.path("part").iterdir():
        entry.rename(another / entry.name)
    before = sorted(another.rglob("*"))
    run = look_at(another)
    assert run.status == "in progress"
    for everything in (False, True):
        with pytest.raises(RunDirError, match="in use"):
            clean(run, everything=everything)
    with pytest.raises(RunDirError, match="in use"):
        stopped("another", resume=True)
    with pytest.raises(RunDirError, match="in use"):
        stopped("another", force=True)
    assert sorted(another.rglob("*")) == before


def test_a_run_in_training_is_in_progress_and_free_afterwards(fit: Fit) -> None:
    seen: list[str] = []
    fit("part", callbacks=[At("on_step_end", 1, lambda run: seen.append(look_at(run.run_dir).status))])
    assert seen == ["in progress"]
    assert not is_held(fit.path("part"))


def test_a_run_that_is_evaluated_is_left_alone(stopped: Fit) -> None:
    path = stopped.path("part")
    record = path / "config.json"
    with held(record, shared=True), held(record, shared=True), pytest.raises(RunDirError, match="in use"):
        clean(look_at(path))
    assert (path / "cache").is_dir()


def test_scratch_goes_with_its_process(tmp_path: Path, another: Path) -> None:
    (tmp_path / ".trgl-dead").mkdir()
    (tmp_path / ".trgl-dead" / "weights").write_bytes(b"x" * 70)
    alive = another.rename(tmp_path / ".trgl-alive")
    assert clean_scratch(tmp_path) == 70
    assert alive.is_dir()
    assert not (tmp_path / ".trgl-dead").exists()


def test_setting_up_removes_what_a_killed_process_left_and_nothing_that_is_new(fit: Fit, another: Path) -> None:
    for name in ("dead", "young", "alive"):
        folder = another.rename(fit.folder / ".trgl-alive") if name == "alive" else fit.folder / f".trgl-{name}"
        folder.mkdir(exist_ok=True)
        (folder / "weights").write_bytes(b"x")
        if name != "young":
            os.utime(folder, (1.0, 1.0))
    fit("run")
    assert {path.name for path in fit.folder.iterdir()} == {".trgl-young", ".trgl-alive", "run"}


def test_a_lock_ends_with_its_context(tmp_path: Path) -> None:
    with held(tmp_path):
        assert is_held(tmp_path)
        with pytest.raises(RunDirError, match="is in use"), held(tmp_path, shared=True):
            pass
    assert not is_held(tmp_path)
    with held(tmp_path / "none"):
        assert not is_held(tmp_path / "none")
