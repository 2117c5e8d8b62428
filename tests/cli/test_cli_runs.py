"""`runs ls` and `runs clean`: text, JSON, and what they refuse."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ondevice_trgl.run.lock import held
from tests.cli.conftest import Cli


@pytest.fixture
def folder(tmp_path: Path, jobs: Any) -> Path:
    """`runs` in the working folder, with two runs, one of them in a folder of its own."""
    for name, status in (("a", "completed"), ("deeper/b", "paused")):
        run = tmp_path / "runs" / name
        (run / "cache").mkdir(parents=True)
        (run / "cache" / "boundary-001-train.bin").write_bytes(b"x" * 2048)
        workload = {"model": "resnet20", "data": "digits"}
        record = {"format": 2, "config": {"budget": 300 << 20}, "workload": workload}
        (run / "config.json").write_text(json.dumps(record))
        (run / "report.json").write_text(json.dumps({"status": status, "budget_bytes": 200 << 20}))
        (run / "model.safetensors").write_bytes(b"x" * 1024)
    return tmp_path / "runs"


def test_ls_lists_where_train_puts_runs(folder: Path, cli: Cli) -> None:
    result = cli("runs", "ls")
    assert result.code == 0
    lines = [line.split() for line in result.out.splitlines()]
    assert lines[1] == ["run", "status", "model", "data", "budget", "weights", "cache", "rest", "written"]
    assert lines[2][:10] == ["runs/a", "completed", "resnet20", "digits", "200", "MiB", "1.0", "KiB", "2.0", "KiB"]
    assert lines[3][:2] == ["runs/deeper/b", "paused"]
    assert lines[-1][-2:] == ["in", "all"]


def test_ls_as_json_of_folders_that_overlap(folder: Path, cli: Cli) -> None:
    record = cli("runs", "ls", "runs", "runs/deeper", "runs/a", "--json").json
    assert [run["run_dir"] for run in record["runs"]] == ["runs/a", "runs/deeper/b"]
    assert record["total_bytes"] == sum(run["total_bytes"] for run in record["runs"])
    assert {run["cache_bytes"] for run in record["runs"]} == {2048}


def test_ls_of_nothing(cli: Cli, tmp_path: Path) -> None:
    assert (cli("runs", "ls").code, cli("runs", "ls").out) == (0, "no runs below runs\n")
    assert cli("runs", "ls", "--json").json["runs"] == []
    missing = cli("runs", "ls", "nowhere")
    assert missing.code == 2
    assert "nowhere does not exist" in missing.err


def test_clean_frees_the_cache(folder: Path, cli: Cli) -> None:
    one = cli("runs", "clean", "runs/a")
    assert (one.code, one.out) == (0, "runs/a: 2.0 KiB\nfreed 2.0 KiB\n")
    (folder / ".trgl-dead").mkdir()
    (folder / ".trgl-dead" / "file").write_bytes(b"x" * 10)
    rest = cli("runs", "clean", "runs", "--cache", "--json").json
    assert rest["freed_bytes"] == 2058
    assert rest["leftover_bytes"] == 10
    assert [run["freed_bytes"] for run in rest["runs"]] == [0, 2048]
    assert (folder / "a" / "model.safetensors").is_file()


def test_clean_all_asks_first(folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    refused = cli("runs", "clean", "runs/a", "--all")
    assert refused.code == 2
    assert "--all removes 1 run, " in refused.err
    assert "--yes" in refused.err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    for answer, code in ((False, 2), (True, 0)):
        assert (folder / "a").is_dir()
        monkeypatch.setattr("typer.confirm", lambda text, answer=answer, **given: answer)
        assert cli("runs", "clean", "runs/a", "--all").code == code
    assert not (folder / "a").exists()
    (folder / "deeper" / "b" / "notes.txt").write_text("mine")
    assert "other files are kept" in cli("runs", "clean", "runs", "--all", "--yes").out
    assert (folder / "deeper" / "b" / "notes.txt").is_file()


def test_clean_refuses_what_is_no_run_and_what_is_in_use(folder: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for path, words in (("photos", "is not a run directory and holds none"), ("none", "does not exist")):
        result = cli("runs", "clean", "runs/a", path)
        assert result.code == 2
        assert words in result.err
    both = cli("runs", "clean", "runs/a", "--cache", "--all")
    assert both.code == 2
    with held(folder / "a"):
        result = cli("runs", "clean", "runs/a")
        assert result.code == 2
        assert "runs/a is in use" in result.err
        assert (folder / "a" / "cache").is_dir()
        below = cli("runs", "clean", "runs", "--json")
        assert below.json["in_use"] == ["runs/a"]
        assert [run["run_dir"] for run in below.json["runs"]] == ["runs/deeper/b"]
        assert "left alone, as a process works on it: runs/a" in below.err
    assert (folder / "a" / "cache" / "boundary-001-train.bin").is_file()


def test_ls_loads_no_torch(folder: Path, run_python: Any) -> None:
    run_python(
        f"import os, sys; os.chdir({str(folder.parent)!r})\n"
        "from ondevice_trgl.cli import main\n"
        "main(['runs', 'ls']); main(['runs', 'clean', 'runs'])\n"
        "assert 'torch' not in sys.modules"
    )
