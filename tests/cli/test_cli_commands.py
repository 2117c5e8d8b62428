"""What each command prints where, and its exit code."""

import dataclasses
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ondevice_trgl import __version__
from ondevice_trgl.cli import app, options
from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.errors import (
    BudgetExceededError,
    BudgetInfeasibleError,
    DataError,
    NonFiniteError,
    RunDirError,
    StorageError,
    TrglError,
)
from ondevice_trgl.report.model import Report
from ondevice_trgl.report.table import Span
from tests.cli.conftest import Cli, Jobs

BUDGET = ("--budget", "600MB")
COMMANDS = (
    "plan",
    "train",
    "compare",
    "resume",
    "evaluate",
    "predict",
    "report",
    "export",
    "env",
    "runs ls",
    "runs clean",
    "profiles ls",
    "profiles show",
)


def test_train_prints_the_report_to_stdout_and_the_rest_to_stderr(cli: Cli, jobs: Jobs) -> None:
    result = cli("train", *BUDGET)
    assert result.code == 0
    assert "Held the budget: measured peak 529 MiB of 572 MiB" in result.out
    assert result.out.rstrip().endswith("trgl-device evaluate runs/resnet18-cifar10")
    assert result.err == "training resnet-small on digits within 600MB, into runs/resnet-small-digits\n"
    assert "\x1b" not in result.out + result.err


def test_paths_of_the_reports_that_exist(cli: Cli, jobs: Jobs, run_dir: Path, report: Report) -> None:
    jobs.report = dataclasses.replace(report, run_dir=str(run_dir))
    assert "report.html" not in cli("train", *BUDGET).out
    (run_dir / "report.html").write_text("", encoding="utf-8")
    out = cli("train", *BUDGET).out
    assert str(run_dir / "report.json") in out
    assert str(run_dir / "report.html") in out


@pytest.mark.parametrize(
    "argv", [("train", *BUDGET), ("plan", *BUDGET), ("resume", "r"), ("train", *BUDGET, "--dry-run")]
)
def test_json_is_one_object(cli: Cli, jobs: Jobs, report: Report, argv: tuple[str, ...]) -> None:
    assert cli(*argv, "--json").json == json.loads(json.dumps(report.to_dict()))


def test_dry_run_is_plan(cli: Cli, jobs: Jobs) -> None:
    assert cli("train", *BUDGET, "--dry-run", "--json").out == cli("plan", *BUDGET, "--json").out
    assert jobs.calls == ["plan", "plan"]


@pytest.mark.parametrize("flag", ["-q", "--progress=none"])
@pytest.mark.parametrize("command", ["train", "plan"])
def test_quiet(cli: Cli, jobs: Jobs, command: str, flag: str) -> None:
    result = cli(command, *BUDGET, flag)
    assert result.err == ""
    assert "Held the budget" in result.out


@pytest.mark.parametrize("command", ["train", "plan"])
def test_infeasible(cli: Cli, jobs: Jobs, command: str) -> None:
    jobs.error = BudgetInfeasibleError(
        "nothing fits 600 MB", budget_bytes=600, smallest_feasible_budget_bytes=700, hint="--budget 700"
    )
    result = cli(command, *BUDGET, "--json")
    assert result.code == 3
    assert result.json == {
        "status": "infeasible",
        "smallest_feasible_budget_bytes": 700,
        "budget_bytes": 600,
        "error": "BudgetInfeasibleError",
        "message": "nothing fits 600 MB",
        "hint": "--budget 700",
    }
    plain = cli(command, *BUDGET, "-q")
    assert (plain.code, plain.out, plain.err) == (3, "", "error: nothing fits 600 MB\nhint: --budget 700\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrglError("m"), 1),
        (DataError("m"), 2),
        (RunDirError("m"), 2),
        (BudgetExceededError("m"), 4),
        (NonFiniteError("m"), 1),
        (StorageError("m"), 1),
        (ValueError("m"), 1),
        (MemoryError("m"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(cli: Cli, jobs: Jobs, error: BaseException, code: int) -> None:
    jobs.error = error
    result = cli("resume", "r")
    assert result.code == code
    assert result.out == ""
    assert "Traceback" not in result.err


def test_an_error_is_json_too(cli: Cli, jobs: Jobs) -> None:
    jobs.error = RunDirError("r is locked", hint="wait")
    result = cli("resume", "r", "--json")
    assert result.json == {"status": "failed", "error": "RunDirError", "message": "r is locked", "hint": "wait"}
    assert result.err == "error: r is locked\nhint: wait\n"
    jobs.error = ValueError("oh")
    assert cli("resume", "r", "--json").json == {"status": "failed", "error": "ValueError", "message": "oh"}


def test_tracebacks_on_request(cli: Cli, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.error = DataError("no such data")
    assert "Traceback" in cli("resume", "r", "-v").err
    assert "Traceback" not in cli("resume", "r").err
    monkeypatch.setenv("TRGL_DEBUG", "1")
    assert "Traceback" in cli("resume", "r").err


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"status": "paused"}, 0),
        ({"status": "failed", "message": "m"}, 1),
        ({"measured_peak_bytes": 600_000_000}, 0),
        ({"measured_peak_bytes": 600_000_001}, 4),
    ],
)
def test_exit_code_of_a_report(cli: Cli, jobs: Jobs, report: Report, changes: dict[str, Any], code: int) -> None:
    jobs.report = dataclasses.replace(report, **changes)
    assert cli("train", *BUDGET).code == code
    assert cli("resume", "r").code == code


def test_a_paused_run_says_how_to_go_on(cli: Cli, jobs: Jobs, report: Report) -> None:
    jobs.report = dataclasses.replace(report, status="paused")
    assert "trgl-device resume runs/resnet18-cifar10" in cli("train", *BUDGET).out


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("train", "--budgt", "1GB"), ("--budgt", "--budget", "trgl-device train --help")),
        (("trian",), ("trian", "train")),
        (("train", *BUDGET, "--progress", "plian"), ("'plian'", "did you mean plain", "auto, none, plain")),
        (("train", *BUDGET, "--baseline", "no"), ("'no'", "auto, full, measure, skip")),
        (("train", *BUDGET, "--optimizer", "adam"), ("'adam'", "did you mean 'adamw'")),
        (("train", *BUDGET, "--cache", "pinned"), ("'pinned'", "auto | memory | disk")),
        (("train", *BUDGET, "--epochs", "x"), ("--epochs",)),
        (("train", "-b", "0"), ("budget = '0'", "600MB")),
        (("train", "-b", "2XB"), ("budget = '2XB'", "600MB")),
        (("train", "-p", "raspberry"), ("'raspberry'", "raspberry-pi-4-2gb")),
        (("export", "r", "--format", "onxx"), ("'onxx'", "state-dict")),
        (("resume",), ("RUN",)),
        (("profiles",), ("command",)),
        (("evaluate", "r", "--head", "first"), ("'first'", "best, last")),
        (("evaluate", "r", "--head", "-1"), ("'-1'", "best, last, ensemble")),
        (("evaluate", "r", "-b", "2XB"), ("2XB", "--budget")),
        (("export", "r", "--head", "ensemble"), ("'ensemble'", "best, last, or")),
        (("predict", "r", "a.jpg", "--top", "0"), ("--top '0'", "at least 1")),
        (("evaluate", "r", "--classes-from-order"), ("other data than the run's own", "--data")),
    ],
)
def test_bad_usage_names_the_way_out(cli: Cli, jobs: Jobs, argv: tuple[str, ...], parts: tuple[str, ...]) -> None:
    result = cli(*argv)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("error: ")
    for part in parts:
        assert part in result.err
    assert jobs.calls == []


def test_evaluate(cli: Cli, jobs: Jobs) -> None:
    result = cli("evaluate", "runs/r", "--head", "3", "--data", "digits", "--data-root", "d", "-b", "1GB")
    given = {"head": "3", "data": "digits", "data_root": "d", "budget": "1GB", "by_order": False}
    assert jobs.arguments == [(Path("runs/r"), given)]
    assert "data: of these classes there are none: 7\n" in result.err
    assert result.code == 0
    assert result.out.splitlines() == [
        "accuracy 87.2% on 1,234 samples of digits, head of module 4",
        "the same as in the run's report",
        "measured peak 400 MiB of 572 MiB",
    ]
    assert cli("evaluate", "runs/r", "--json").json["accuracy"] == 0.8725
    usual = {"head": "best", "data": None, "data_root": None, "budget": None, "by_order": False}
    assert jobs.arguments[-1] == (Path("runs/r"), usual)
    cli("evaluate", "runs/r", "--data", "folder:x", "--classes-from-order")
    assert jobs.arguments[-1][1]["by_order"] is True


def test_predict(cli: Cli, jobs: Jobs) -> None:
    result = cli("predict", "runs/r", "a.jpg", "b", "--top", "2", "--head", "last")
    assert jobs.arguments == [(Path("runs/r"), [Path("a.jpg"), Path("b")], {"head": "last", "top": 2, "budget": None})]
    assert result.code == 0
    assert [line.split() for line in result.out.splitlines()] == [
        ["Predictions"],
        ["file", "class", "confidence"],
        ["a.jpg", "cat", "75.0%"],
        ["dog", "25.0%"],
        ["b", "cat", "75.0%"],
        ["dog", "25.0%"],
        ["measured", "peak", "400", "MiB", "of", "572", "MiB"],
    ]
    assert "left out: 1 .txt files" in result.err
    long = f"{'n' * 150}.jpg"
    assert long in cli("predict", "runs/r", long).out, "a path is there to be copied"
    assert r"a\nb.jpg" in cli("predict", "runs/r", "a\nb.jpg").out
    assert [one["class"] for one in cli("predict", "runs/r", "a.jpg", "--json").json["predictions"]] == ["cat"]
    jobs.peak_bytes = 601_000_000
    assert cli("predict", "runs/r", "a.jpg").code == 4
    assert cli("predict", "runs/r").code == 2


def test_evaluate_with_all_heads_has_no_figure_to_compare_with(cli: Cli, jobs: Jobs) -> None:
    assert cli("evaluate", "runs/r", "--head", "ensemble").out.splitlines() == [
        "accuracy 87.2% on 1,234 samples of digits, all heads together",
        "measured peak 400 MiB of 572 MiB",
    ]


def test_evaluate_over_the_budget_ends_with_the_same_code_as_training(cli: Cli, jobs: Jobs) -> None:
    jobs.peak_bytes = 601_000_000
    assert cli("evaluate", "runs/r").code == 4
    assert cli("evaluate", "runs/r", "--json").code == 4


@pytest.mark.parametrize("columns", ["80", "200"])
def test_report_on_the_terminal(cli: Cli, run_dir: Path, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    result = cli("report", str(run_dir))
    assert result.code == 0
    table = [line for line in result.out.splitlines() if "MiB" in line]
    assert max(map(len, table)) <= int(columns)


def test_report_as_json(cli: Cli, run_dir: Path, report: Report) -> None:
    assert Report.from_dict(cli("report", str(run_dir), "--json").json) == report


def test_report_as_a_page_never_overwrites_unasked(cli: Cli, run_dir: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = cli("report", str(run_dir), "--html", str(page))
    assert (result.code, result.out) == (0, f"{page}\n")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    page.write_text("mine", encoding="utf-8")
    refused = cli("report", str(run_dir), "--html", str(page))
    assert refused.code == 2
    assert "--force" in refused.err
    assert page.read_text(encoding="utf-8") == "mine"
    assert cli("report", str(run_dir), "--html", str(page), "--force").code == 0
    assert cli("report", str(run_dir), "--html", str(tmp_path / "absent" / "page.html")).code == 1


def test_report_of_nothing(cli: Cli, tmp_path: Path) -> None:
    result = cli("report", str(tmp_path / "nowhere"))
    assert result.code == 2
    assert "nowhere" in result.err
    (tmp_path / "report.json").write_text("{", encoding="utf-8")
    assert cli("report", str(tmp_path)).code == 1


def test_export(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[Path, dict[str, Any]]] = []

    def export_run(run_dir: Path, **given: Any) -> Path:
        calls.append((run_dir, given))
        output: Path = given["output"]
        output.write_bytes(b"12345")
        return output

    module = ModuleType("ondevice_trgl.export")
    monkeypatch.setattr(module, "export_run", export_run, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert cli("export", "runs/r").out == "r.safetensors\n"
    assert cli("export", "runs/r", "--head", "2", "-o", "m.st", "--force", "--json").json == {
        "path": "m.st",
        "bytes": 5,
        "format": "state-dict",
    }
    usual = {"format": "state-dict", "head": "best", "output": Path("r.safetensors"), "force": False}
    assert calls == [
        (Path("runs/r"), usual),
        (Path("runs/r"), usual | {"head": 2, "output": Path("m.st"), "force": True}),
    ]


def test_profiles(cli: Cli, jobs: Jobs) -> None:
    listed = cli("profiles", "ls", "--json").json["profiles"]
    names = [profile["name"] for profile in listed]
    assert "raspberry-pi-4-2gb" in names
    table = cli("profiles", "ls").out
    assert all(name in table for name in names)
    shown = cli("profiles", "show", "raspberry-pi-4-2gb")
    assert re.search(r"ram +2\.00 GiB", shown.out)
    assert cli("profiles", "show", "raspberry-pi-4-2gb", "--json").json in listed
    assert cli("profiles", "show", "raspberry").code == 2


def test_env(cli: Cli, jobs: Jobs) -> None:
    facts = cli("env", "--json").json
    assert {"torch", "device", "threads", "allocator", "platform"} <= set(facts)
    text = cli("env").out
    assert facts["torch"] in text
    assert "None" not in text


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(cli: Cli, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    result = cli(*command.split(), "--help")
    assert result.code == 0
    if command:
        # each example is of the command it stands under
        assert f"Example: trgl-device {command}" in result.out
    if command in ("plan", "train", "compare"):
        panels = re.findall(r"─ ([A-Z][\w ]+) ─", result.out)
        assert panels == ["Options", "Memory", "What to train", "Method", "Run and output"]


def test_no_command_is_help(cli: Cli) -> None:
    assert cli().out == cli("--help").out


def test_version(cli: Cli) -> None:
    result = cli("--version")
    assert result.code == 0
    assert result.out in (f"{__version__}\n", "not installed: run from a source tree\n")


def test_plan_takes_what_train_takes() -> None:
    taken = {name: set(names) for name, _, names, *_ in app.COMMANDS}
    assert taken["train"] - taken["plan"] == {"dry_run"}
    assert {*options.TRAINING, "pareto"} == taken["plan"]


@pytest.mark.parametrize("command", ["plan", "train"])
def test_how_far_the_pictures_are_is_said_on_stderr_to_who_wants_it(cli: Cli, jobs: Jobs, command: str) -> None:
    jobs.says = ["preparing 20,000 pictures: 40%"]
    result = cli(command, *BUDGET)
    assert jobs.says[0] in result.err.splitlines()
    assert "preparing" not in result.out
    for flag in ("-q", "--progress=none"):
        assert "preparing" not in cli(command, *BUDGET, flag).err


def test_a_terminal_that_lacks_a_letter_shows_its_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", stream)
    Shell("trgl-device predict", no_color=True).lines([(Span("caf\xe9"), Span(" 90%"))])
    stream.flush()
    assert stream.buffer.getvalue().decode("ascii") == "caf\\xe9 90%\n"
