"""A run directory that somebody else made: links in it are refused, and so is what no program of this version wrote."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ondevice_trgl.errors import DamagedFileError, RunDirError, StorageError, TrglError
from ondevice_trgl.export import export_run
from ondevice_trgl.model.header import read_header
from ondevice_trgl.model.partition import group
from ondevice_trgl.model.tensorfile import read_tensors, write_tensors
from ondevice_trgl.model.trace import trace
from ondevice_trgl.report.model import read_report
from ondevice_trgl.run.inventory import look_at
from ondevice_trgl.run.opening import fresh_head
from ondevice_trgl.run.run_dir import RunDir
from ondevice_trgl.run.trained import TrainedRun
from tests.run.conftest import At, Fit, config, net
from tests.run.test_resume import pause

pytestmark = pytest.mark.usefixtures("code_pages_kept")


@pytest.fixture(scope="module")
def paused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is paused in its second module."""
    fit = Fit(tmp_path_factory.mktemp("paused"))
    assert fit("part", callbacks=[At("on_step_end", 8, pause)]).status == "paused"
    return fit.path("part")


@pytest.fixture
def stopped(fit: Fit, paused: Path) -> Fit:
    """A copy of it, `part`."""
    shutil.copytree(paused, fit.path("part"))
    return fit


def uses(fit: Fit, path: Path) -> list[Callable[[], object]]:
    """Ways to open the run at `path`."""
    return [
        lambda: RunDir.open(path),
        lambda: TrainedRun.open(path),
        lambda: export_run(path, format="state-dict", head="best", output=fit.folder / "out", force=True),
        lambda: fit(path.name, resume=True),
    ]


NAMES = ("config.json", "plan.json", "modules", "cache", "modules/000.safetensors", "names.json", "report.json")


@pytest.mark.parametrize("name", [*NAMES, "weights.safetensors", "events.jsonl"])
def test_a_link_inside_is_refused(name: str, stopped: Fit) -> None:
    run = stopped.path("part")
    (run / name).rename(stopped.folder / "elsewhere")
    (run / name).symlink_to(stopped.folder / "elsewhere")
    for use in uses(stopped, run):
        with pytest.raises(RunDirError, match="is a link"):
            use()


@pytest.mark.parametrize("name", ["modules/003.pending", "modules/x", "cache/x", ".config.json.tmp", ".trgl-x"])
def test_a_link_that_leads_nowhere_is_refused_too(name: str, stopped: Fit) -> None:
    run = stopped.path("part")
    (run / name).symlink_to(stopped.folder / "gone")
    for use in uses(stopped, run):
        with pytest.raises(RunDirError, match="is a link"):
            use()
    assert not (stopped.folder / "gone").exists()


@pytest.mark.parametrize("name", ["config.json", "modules/000.safetensors", "report.json", "events.jsonl", "cache/x"])
def test_a_pipe_inside_is_not_waited_for(name: str, stopped: Fit) -> None:
    run = stopped.path("part")
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    for use in uses(stopped, run):
        with pytest.raises(RunDirError, match="no regular file"):
            use()


def test_a_run_that_is_reached_through_a_link_goes_on(stopped: Fit) -> None:
    (stopped.folder / "real").mkdir()
    stopped.path("part").rename(stopped.folder / "real" / "part")
    stopped.path("part").symlink_to(stopped.folder / "real" / "part")
    (stopped.path("part") / "my notes").symlink_to(stopped.folder)  # which is none of ours
    assert stopped("part", resume=True).status == "completed"
    assert (stopped.folder / "real" / "part" / "model.safetensors").is_file()


def test_a_folder_where_a_file_belongs_and_the_other_way_round(stopped: Fit) -> None:
    run = stopped.path("part")
    (run / "modules" / "002.pending").mkdir()
    with pytest.raises(StorageError, match=r"002\.pending"):
        stopped("part", resume=True)
    (run / "modules" / "002.pending").rmdir()
    for name in ("plan.json", "modules/000.safetensors"):
        (run / name).unlink()
        (run / name).mkdir()
    with pytest.raises(DamagedFileError, match="is a folder"):
        stopped("part", resume=True)
    shutil.rmtree(run / "modules")
    (run / "modules").write_bytes(b"x")
    for use in uses(stopped, run):
        with pytest.raises(RunDirError, match="expected a folder"):
            use()


@pytest.mark.parametrize(
    ("name", "value"), [("cache_dir", "x" * 5000), ("cache_dir", "a\0b"), ("threads", 2**40), ("seed", 2**63)]
)
def test_settings_that_no_system_takes(name: str, value: Any, stopped: Fit) -> None:
    path = stopped.path("part") / "config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**record, "config": {**record["config"], name: value}}), encoding="utf-8")
    for use in (lambda: stopped("part", resume=True), lambda: look_at(path.parent)):
        with contextlib.suppress(DamagedFileError):
            use()


def test_a_head_that_no_machine_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = trace(net(), torch.zeros(2, 1, 6, 6))
    partition = group(chain, [0, 1, len(chain.segments)])
    assert fresh_head(chain, partition, config(), 0) is not None
    monkeypatch.setattr(partition.modules[0], "out_shape", (2**40, 6, 6))
    with pytest.raises(DamagedFileError, match="head of module 0"):
        fresh_head(chain, partition, config(), 0)


def test_events_are_not_written_through_a_link(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "run")
    (run.path / "events.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(StorageError, match=r"events\.jsonl"):
        run.event("x")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (3, r"made by a newer version \(format 3, this program reads up to 2\)\n  hint: upgrade"),
        (1, r"made by an older version \(format 1, this program reads 2\)"),
        ("2", "states no format"),
        (2.0, "states no format"),
        (None, "states no format"),
        (True, "states no format"),
    ],
)
def test_another_format_is_named_wherever_a_run_is_opened(version: Any, said: str, stopped: Fit) -> None:
    run = stopped.path("part")
    record = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps({**record, "format": version}), encoding="utf-8")
    (run / "plan.json").write_text("what this program knows nothing of", encoding="utf-8")
    again: Callable[[], object] = lambda: stopped("part", force=True)  # noqa: E731
    for use in (*uses(stopped, run), again):
        with pytest.raises(RunDirError, match=said):
            use()


def test_a_report_of_a_newer_version_is_named(stopped: Fit) -> None:
    path = stopped.path("part") / "report.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**record, "schema_version": 2}), encoding="utf-8")
    with pytest.raises(RunDirError, match=r"newer version \(schema version 2, this program reads up to 1\)"):
        read_report(stopped.path("part"))


def rewritten(path: Path, position: dict[str, Any] | None = None, **tensors: torch.Tensor) -> None:
    """The module at `path` with another position, or other tensors."""
    metadata = read_header(path)[1]
    old = json.loads(metadata["position"])
    write_tensors(path, {**read_tensors(path), **tensors}, {"position": json.dumps({**old, **(position or {})})})


@pytest.mark.parametrize(
    "position",
    [
        {"epoch": "1"},
        {"epoch": -1},
        {"measured": {"val_accuracy": "high"}},
        {"measured": 5},
        {"rung": {"micro_batch_size": 10**9}},
        {"callbacks": [["a"]]},
        {"callbacks": 7},
        {"tally": {"samples": None}},
        {"more": 1},
        {"saves": 2**70},
        {"written_bytes": float("nan")},
    ],
)
def test_a_position_that_is_none(position: dict[str, Any], stopped: Fit) -> None:
    rewritten(stopped.path("part") / "modules" / "001.safetensors", position)
    with pytest.raises(DamagedFileError, match=r"001\.safetensors is damaged: its position"):
        stopped("part", resume=True)


@pytest.mark.parametrize(
    "tensors",
    [
        {"run.rng": torch.zeros(3, dtype=torch.uint8)},
        {"run.rng": torch.zeros(16)},
        {"run.rng_python": torch.zeros(5, dtype=torch.int64)},
        {"run.rng_python": torch.full((625,), -1)},
        {"run.rng_numpy": torch.full((625,), 10**6)},
        {"optim.momentum.more": torch.zeros(3)},
        {"optim.mean.weight": torch.zeros(3)},
        {"module.more": torch.zeros(3)},
    ],
    ids=lambda tensors: str(*tensors),
)
def test_tensors_that_do_not_belong_there(tensors: dict[str, torch.Tensor], stopped: Fit) -> None:
    rewritten(stopped.path("part") / "modules" / "001.safetensors", None, **tensors)
    with pytest.raises(DamagedFileError):
        stopped("part", resume=True)


@pytest.mark.parametrize("name", ["config.json", "plan.json", "partition.json", "names.json"])
@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 10_000, '{"format": 2, "format": 2}', "\x00", '{"a": 1e999}'])
def test_a_record_that_is_none(name: str, text: str, stopped: Fit) -> None:
    (stopped.path("part") / name).write_text(text, encoding="utf-8")
    with pytest.raises(TrglError):
        stopped("part", resume=True)
