"""A run directory is whole or not there, and never takes what is not its own."""

import json
import os
from pathlib import Path

import pytest

from ondevice_trgl import RunDirError, StorageError
from ondevice_trgl.errors import DamagedFileError
from ondevice_trgl.run.run_dir import FORMAT, RunDir


def made(path: Path) -> RunDir:
    run = RunDir.create(path)
    run.write("plan.json", {})
    run.write("config.json", {"format": FORMAT, "config": {}, "workload": {}})
    return run


def test_what_exists_needs_force(tmp_path: Path) -> None:
    run = made(tmp_path / "a" / "run")
    (run.modules / "000.safetensors").write_bytes(b"old")
    for call in (RunDir.check, RunDir.create):
        with pytest.raises(RunDirError, match="exists and is not empty") as caught:
            call(run.path, force=False)
        assert "--force" in caught.value.hint
        assert "resume" in caught.value.hint
    assert (run.modules / "000.safetensors").exists()
    RunDir.create(run.path, force=True)
    assert [path.name for path in run.path.iterdir()] == ["modules"]
    assert list(run.modules.iterdir()) == []


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert RunDir.create(tmp_path / "run").modules.is_dir()


@pytest.mark.parametrize("names", [["notes.txt"], ["cache/x"], ["modules/main.tf", "main.tf"], ["report.json"]])
@pytest.mark.parametrize("config", [None, "{}", "[]", "no json"])
def test_force_never_touches_a_foreign_folder(tmp_path: Path, names: list[str], config: str | None) -> None:
    folder = tmp_path / "project"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine", encoding="utf-8")
    if config is not None:
        (folder / "config.json").write_text(config, encoding="utf-8")
    for call in (RunDir.check, RunDir.create):
        with pytest.raises(RunDirError, match="is not a run directory"):
            call(folder, force=True)
    assert all((folder / name).read_text(encoding="utf-8") == "mine" for name in names)


def test_force_keeps_what_a_user_put_into_a_run(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    (run.path / "notes.txt").write_text("mine", encoding="utf-8")
    (run.path / ".report.json.tmp").write_text("torn", encoding="utf-8")
    elsewhere = tmp_path / "fast-disk"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine", encoding="utf-8")
    (run.path / "cache").symlink_to(elsewhere)
    RunDir.create(run.path, force=True)
    assert sorted(path.name for path in run.path.iterdir()) == ["modules", "notes.txt"]
    assert (elsewhere / "file").exists()


def test_the_beginnings_of_a_run_can_be_replaced(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "run").write("plan.json", {})
    with pytest.raises(RunDirError, match="is not a run directory"):
        RunDir.open(tmp_path / "run")
    RunDir.create(tmp_path / "run", force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_the_way(tmp_path: Path, force: bool) -> None:
    file = tmp_path / "run"
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(RunDirError, match="is a file"):
        RunDir.check(file, force=force)
    for below in (file / "run", file / "a" / "b"):
        with pytest.raises(RunDirError, match="cannot be"):
            RunDir.create(below, force=force)
    assert file.read_text(encoding="utf-8") == "mine"


def test_a_place_where_nothing_can_be_made() -> None:
    with pytest.raises(RunDirError, match="cannot be"):
        RunDir.create(Path("/proc/trgl/run"))


@pytest.mark.parametrize("place", ["/proc/nowhere/deep", "file/cache"])
def test_a_place_where_no_activations_can_be_kept_is_refused_at_once(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match="activations cannot be kept in ") as caught:
        RunDir.check(tmp_path / "run", force=False, cache_dir=tmp_path / place)
    assert "--cache-dir" in caught.value.hint
    RunDir.check(tmp_path / "run", force=False, cache_dir=tmp_path / "new" / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunDirError, match="no permission"):
            RunDir.check(tmp_path / "run", force=False)
    finally:
        tmp_path.chmod(0o700)


def test_a_run_of_another_version(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    run.write("config.json", {"format": FORMAT + 1, "config": {}})
    with pytest.raises(RunDirError, match=rf"newer version \(format {FORMAT + 1}, this program reads up to {FORMAT}\)"):
        RunDir.open(run.path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\xff"])
def test_a_damaged_record(tmp_path: Path, text: str) -> None:
    run = made(tmp_path / "run")
    (run.path / "plan.json").write_text(text, encoding="latin-1")
    with pytest.raises(DamagedFileError, match=r"plan\.json"):
        run.read("plan.json")


def test_a_write_that_fails_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path / "run")
    run.write("report.json", {"a": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            run.write("report.json", {"a": 2})
    assert run.read("report.json") == {"a": 1}
    run.write("report.json", {"a": 2})
    assert run.read("report.json") == {"a": 2}
    assert not list(run.path.glob(".*.tmp"))


def test_events_are_json_lines(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    run.event("epoch", module=0, loss=1.5)
    run.event("pause")
    lines = [json.loads(line) for line in (run.path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["event"], line.get("loss")) for line in lines] == [("epoch", 1.5), ("pause", None)]


def test_every_run_has_a_cache_folder_of_its_own(tmp_path: Path) -> None:
    one, two = made(tmp_path / "one"), made(tmp_path / "two")
    shared = tmp_path / "shared"
    folders = {run.cache_folder(shared) for run in (one, two)}
    assert len(folders) == 2
    assert {folder.parent for folder in folders} == {shared}
    assert RunDir(tmp_path / "two" / ".." / "one").cache_folder(shared) == one.cache_folder(shared)
    assert one.cache_folder(None) == one.cache
    for folder in folders:
        folder.mkdir(parents=True)
    one.clear_cache(shared)
    assert [folder.exists() for folder in (one.cache_folder(shared), two.cache_folder(shared))] == [False, True]
