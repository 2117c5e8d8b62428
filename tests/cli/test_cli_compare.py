"""`compare` at the command line: what reaches the processes that measure, what is printed where, the exit codes."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from ondevice_trgl.cli import options
from ondevice_trgl.cli.compare import run_compare
from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.errors import BudgetInfeasibleError, SizeError, TrglError, UsageError
from ondevice_trgl.job import Job
from tests.cli.conftest import SAMPLE, Cli, Jobs

FEASIBLE = 600_000_000
SHELL_FLAGS = ("json", "quiet", "verbose", "no_color")


class Processes:
    """Stands in for `processes.ask`; TRGL fits from 600 MB on, and takes 500 MB."""

    def __init__(self, error: TrglError | None = None) -> None:
        self.jobs: list[Job] = []
        self.error = error

    def __call__(self, name: str, request: dict[str, Any], **start: Any) -> dict[str, Any]:
        if name == "baseline":
            peak = {"status": "measured", "measured_peak_bytes": 10**9, "floor_bytes": 10**8, "seconds_per_epoch": 2.0}
            return {**peak, "batch_size": 32, "micro_batch_size": 32 // request["accumulate"]}
        job = Job.from_dict(json.loads(json.dumps(request)))
        self.jobs.append(job)
        if self.error is not None:
            raise self.error
        budget = job.config.budget_bytes or 0
        if budget < FEASIBLE:
            raise BudgetInfeasibleError(
                "too small", budget_bytes=budget, smallest_feasible_budget_bytes=FEASIBLE, hint="--budget 600MB"
            )
        record: dict[str, Any] = json.loads(SAMPLE.read_text(encoding="utf-8"))
        return {**record, "measured_peak_bytes": 500_000_000 if budget < 10**9 else budget + 1}


def given(**values: Any) -> dict[str, Any]:
    """What the parser hands over where nothing else is said."""
    declared = options._DECLARED
    usual = {
        name: None if declared[name].default is inspect.Parameter.empty else declared[name].default
        for name in options.COMPARING
        if name not in SHELL_FLAGS
    }
    assert not set(values) - set(usual)
    return usual | values


def test_every_budget_is_a_row_however_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ask = Processes()
    budgets = ["600MB,700MB", "800MB"]
    assert run_compare(Shell("trgl-device compare"), given(budgets=budgets, lr=0.5, allocator="glibc"), ask) == 0
    assert [job.config.budget_bytes for job in ask.jobs] == [600_000_000, 700_000_000, 800_000_000]
    assert {(job.config.lr, job.allocator, job.baseline) for job in ask.jobs} == {(0.5, "glibc", "skip")}
    assert list(tmp_path.iterdir()) == []


def test_the_budget_of_a_file_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text('budget = "650MB"\n', encoding="utf-8")
    ask = Processes()
    assert run_compare(Shell(""), given(config="mine.toml"), ask) == 0
    assert [job.config.budget_bytes for job in ask.jobs] == [650_000_000]


def test_a_table_on_stdout_and_progress_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_compare(Shell("c"), given(budgets=["600MB"]), Processes()) == 0
    out, err = capsys.readouterr()
    assert [line.split("  ")[0] for line in out.splitlines()[2:7]] == [
        "plain end-to-end", "tuned end-to-end", "with accumulation", "with checkpoints", "TRGL, 600MB",
    ]  # fmt: skip
    assert err.splitlines()[0] == "[1/5] plain end-to-end ..."
    assert run_compare(Shell("c", quiet=True), given(budgets=["600MB"]), Processes()) == 0
    assert capsys.readouterr().err == ""
    assert run_compare(Shell("c"), given(budgets=["600MB"], progress="none"), Processes()) == 0
    assert capsys.readouterr().err == ""


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell("trgl-device compare -b 600MB", json=True, verbose=True)
    assert run_compare(shell, given(budgets=["600MB"], repeat="2"), Processes()) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert (record["command"], record["repeat"], len(record["rows"])) == ("trgl-device compare -b 600MB", 2, 5)
    assert [len(row["runs"]) for row in record["rows"]] == [2] * 5
    assert "flag" in err  # -v: where each setting came from


@pytest.mark.parametrize(
    ("budgets", "error", "code"),
    [
        ("600MB", None, 0),
        ("500MB,600MB", None, 0),
        ("500MB,550MB", None, 3),
        ("500MB,2GB", None, 4),  # the second goes over
        ("600MB", TrglError("it broke"), 1),
    ],
)
def test_exit_codes(budgets: str, error: TrglError | None, code: int) -> None:
    assert run_compare(Shell("c", json=True), given(budgets=[budgets]), Processes(error)) == code


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ({"budgets": ["600MB,"]}, SizeError, "--budget ''"),
        ({"budgets": ["600MB", "2XB"]}, SizeError, "--budget '2XB'"),
        ({"budgets": ["600MB,600MB"]}, UsageError, "is there twice"),
        ({"budgets": None}, UsageError, "no memory budget"),
        ({"budgets": ["1GB"], "accumulate": "0"}, UsageError, "accumulate = 0"),
        ({"budgets": ["1GB"], "repeat": "-1"}, UsageError, "repeat = -1"),
    ],
)
def test_bad_values(values: dict[str, Any], kind: type[UsageError], words: str) -> None:
    ask = Processes()
    with pytest.raises(kind, match=words) as caught:
        run_compare(Shell("c"), given(**values), ask)
    assert caught.value.hint
    assert ask.jobs == []


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ((), ("no memory budget", "--budget")),
        (("-b", "1GB,much"), ("--budget 'much'", "600MB")),
        (("-b", "1GB", "--repeat", "twice"), ("repeat = 'twice'", "a whole number", "--repeat 3")),
        (("-b", "1GB", "--repeat", "0"), ("repeat = 0", "at least 1")),
        (("-b", "1GB", "--accumulate", "4.5"), ("accumulate = '4.5'", "--accumulate 3")),
        (("-b", "1GB", "--accumulate", "0"), ("accumulate = 0", "at least 2")),
        (("-b", "1GB", "-b", "1000MB"), ("'1000MB' is there twice", "--repeat")),
        (("-b", "1GB", "--baseline", "skip"), ("--baseline", "trgl-device compare --help")),
        (("-b", "1GB", "--epochs", "0"), ("epochs = 0",)),
        (("-b", "1GB", "--model", "resnet-smal"), ("did you mean resnet-small",)),
        (("-b", "1GB", "--weights", "absent.pt"), ("absent.pt", "check the path")),
        (("-b", "1GB", "-o", "taken"), ("taken", "--run-dir")),
    ],
)
def test_bad_usage_names_the_way_out(cli: Cli, jobs: Jobs, tmp_path: Path, argv: tuple[str, ...], parts: Any) -> None:
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    result = cli("compare", *argv)
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[0].startswith("error: ")
    assert [part for part in parts if part not in result.err] == []


def test_compare_takes_what_train_takes() -> None:
    assert set(options.TRAINING) - set(options.COMPARING) == {"budget", "baseline"}
