"""Ways to train beside each other: what is asked of whom and in which order, and what becomes of each answer."""

import dataclasses
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ondevice_trgl.compare import compare
from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.errors import (
    BudgetExceededError,
    BudgetInfeasibleError,
    DataError,
    PartitionError,
    ProcessDiedError,
    RunDirError,
    SizeError,
    TrglError,
    UnknownNameError,
    UsageError,
)
from ondevice_trgl.job import BaselineRequest, Job
from ondevice_trgl.report.comparison import Comparison, Row, comparison_lines
from ondevice_trgl.report.model import BaselineReport, Report, SecondsReport
from ondevice_trgl.report.table import plain

SAMPLE = Path(__file__).resolve().parent / "report" / "sample.json"
END_TO_END = ["plain", "e2e", "e2e_accumulate", "e2e_checkpoint"]


class Processes:
    """Stands in for `ask`: notes every request, and answers it or raises. The n-th answer of a row is n larger."""

    def __init__(self, **errors: TrglError) -> None:
        self.asked: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.starts: dict[str, tuple[Mapping[str, str] | None, bool]] = {}
        self.errors = errors
        self.absent: dict[str, Any] = {}
        self.report = Report.from_dict(json.loads(SAMPLE.read_text(encoding="utf-8")))

    def __call__(
        self, name: str, request: dict[str, Any], *, environment: Mapping[str, str] | None = None, lean: bool = True
    ) -> dict[str, Any]:
        values = json.loads(json.dumps(request))
        row = values["name"] if name == "baseline" else f"trgl_{values['config']['budget']}"
        self.asked.append(row)
        self.requests.append(values)
        self.starts[row] = (environment, lean)
        if row in self.errors:
            raise self.errors[row]
        turn = self.asked.count(row)
        return self._end_to_end(values, turn) if name == "baseline" else self._trgl(values, turn)

    def _end_to_end(self, values: dict[str, Any], turn: int) -> dict[str, Any]:
        asked = BaselineRequest.from_dict(values)
        assert asked.scratch_dir.is_dir()
        report = BaselineReport(
            status="measured",
            batch_size=asked.batch_size,
            micro_batch_size=asked.micro_batch(asked.batch_size),
            measured_peak_bytes=1000 + turn,
            floor_bytes=400,
            seconds_per_epoch=float(turn),
        )
        return vars(dataclasses.replace(report, **self.absent))

    def _trgl(self, values: dict[str, Any], turn: int) -> dict[str, Any]:
        job = Job.from_dict(values)
        assert job.baseline == "skip"
        job.run_dir.mkdir(parents=True)
        return dataclasses.replace(
            self.report,
            measured_peak_bytes=500 + turn,
            predicted_peak_bytes=510,
            floor_bytes=300,
            seconds=SecondsReport(total=9.0, training=6.0, cache=2.0, per_epoch=4.0),
        ).to_dict()


def job(folder: Path, **settings: Any) -> Job:
    config = TrainConfig(budget="1KB", **settings)
    return Job(Workload(model="resnet-small", data="digits"), config, folder / "runs", command="trgl-device compare")


def rows_of(comparison: Comparison) -> dict[str, Row]:
    return {row.name: row for row in comparison.rows}


def test_every_row_is_measured_on_the_same_work(tmp_path: Path) -> None:
    ask = Processes()
    result = compare(job(tmp_path, lr=0.5, seed=3), ["1KB", "2KB"], ask=ask)
    assert ask.asked == [*END_TO_END, "trgl_1000", "trgl_2000"]
    assert [row.name for row in result.rows] == [*END_TO_END, "trgl 1KB", "trgl 2KB"]
    assert {json.dumps(request["workload"]) for request in ask.requests} == {json.dumps(result.workload)}
    assert {json.dumps({**request["config"], "budget": 0}) for request in ask.requests} == {
        json.dumps({**ask.requests[0]["config"], "budget": 0})
    }
    assert [request["accumulate"] for request in ask.requests[:4]] == [1, 1, 4, 1]
    assert list(tmp_path.iterdir()) == []


def test_plain_starts_untuned_and_the_others_as_the_command_line_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    ask = Processes()
    compare(dataclasses.replace(job(tmp_path), allocator="auto"), ["1KB"], ask=ask)
    environment, lean = ask.starts["plain"]
    assert environment is not None
    assert not lean
    assert not [name for name in environment if name.startswith(("LD_PRELOAD", "MALLOC_"))]
    assert {request["allocator"] for request in ask.requests[1:]} == {"auto"}
    assert ask.requests[0]["allocator"] == "system"
    tuned = [ask.starts[name] for name in ask.asked[1:]]
    assert all(start == tuned[0] for start in tuned)
    assert tuned[0][1]
    assert tuned[0][0] is not None
    assert tuned[0][0]["MALLOC_ARENA_MAX"] == "1"


def test_figures_of_a_row(tmp_path: Path) -> None:
    result = compare(job(tmp_path), ["1KB"], ask=Processes()).to_dict()
    records = {row["name"]: row for row in result["rows"]}
    e2e, trgl = records["e2e"], records["trgl 1KB"]
    assert (e2e["status"], e2e["peak_bytes"], e2e["above_floor_bytes"], e2e["seconds_per_epoch"]) == (
        "measured", 1001, 601, 1.0,
    )  # fmt: skip
    assert (e2e["budget_bytes"], e2e["predicted_peak_bytes"], e2e["modules"]) == (None, None, None)
    assert (trgl["status"], trgl["budget_bytes"], trgl["peak_bytes"], trgl["above_floor_bytes"]) == (
        "measured", 1000, 501, 201,
    )  # fmt: skip
    assert (trgl["predicted_peak_bytes"], trgl["modules"]) == (510, Processes().report.plan.num_modules)
    assert (trgl["seconds_per_epoch"], trgl["training_seconds_per_epoch"], trgl["caching_seconds_per_epoch"]) == (
        4.0, 3.0, 1.0,
    )  # fmt: skip
    assert result["environment"] == Processes().report.environment
    assert (result["workload"]["model"], result["config"]["batch_size"]) == ("resnet-small", 32)
    assert "budget" not in result["config"]
    assert json.loads(json.dumps(result)) == result


def test_rows_are_measured_in_turn_and_the_median_is_theirs(tmp_path: Path) -> None:
    ask = Processes()
    result = compare(job(tmp_path), ["1KB"], repeat=3, ask=ask)
    assert ask.asked == [*END_TO_END, "trgl_1000"] * 3
    record = rows_of(result)["plain"].to_dict()
    assert (record["peak_bytes"], record["seconds_per_epoch"]) == (1002, 2.0)
    assert [run["peak_bytes"] for run in record["runs"]] == [1001, 1002, 1003]
    assert [run["above_floor_bytes"] for run in record["runs"]] == [601, 602, 603]
    assert result.to_dict()["repeat"] == 3
    assert "medians of 3" in plain(comparison_lines(result))[0]


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ProcessDiedError("gone", returncode=-signal.SIGKILL), "did_not_fit", "killed by the system"),
        (ProcessDiedError("the process ended with status -11", returncode=-11), "failed", "status -11"),
        (TrglError("something else"), "failed", "something else"),
        (PartitionError("cannot be cut"), "failed", "cannot be cut"),
    ],
)
def test_what_was_not_measured_has_a_reason_and_no_figure_and_is_not_tried_again(
    tmp_path: Path, error: TrglError, status: str, words: str
) -> None:
    ask = Processes(e2e_checkpoint=error)
    row = rows_of(compare(job(tmp_path), ["1KB"], repeat=2, ask=ask))["e2e_checkpoint"].to_dict()
    assert (row["status"], row["peak_bytes"], row["seconds_per_epoch"]) == (status, None, None)
    assert words in row["reason"]
    assert ask.asked.count("e2e_checkpoint") == 1
    assert ask.asked.count("e2e") == 2


def test_memory_refused_inside_a_baseline_is_no_figure(tmp_path: Path) -> None:
    ask = Processes()
    nothing = {"measured_peak_bytes": None, "floor_bytes": None, "seconds_per_epoch": None}
    ask.absent = {"status": "did_not_fit", "reason": "MemoryError", **nothing}
    result = compare(job(tmp_path), ["1KB"], ask=ask)
    for name in END_TO_END:
        record = rows_of(result)[name].to_dict()
        assert (record["status"], record["reason"], record["peak_bytes"]) == ("did_not_fit", "MemoryError", None)
    text = "\n".join(plain(comparison_lines(result)))
    assert "plain end-to-end did not fit: MemoryError" in text
    assert "of plain" not in text  # there is nothing to hold it against


def test_a_row_that_failed_the_second_time_has_no_median(tmp_path: Path) -> None:
    class Once(Processes):
        def __call__(self, name: str, request: dict[str, Any], **start: Any) -> dict[str, Any]:
            if request.get("name") == "e2e" and "e2e" in self.asked:
                raise ProcessDiedError("gone", returncode=-signal.SIGKILL)
            return super().__call__(name, request, **start)

    record = rows_of(compare(job(tmp_path), ["1KB"], repeat=3, ask=Once()))["e2e"].to_dict()
    assert (record["status"], record["peak_bytes"]) == ("did_not_fit", None)
    assert [run["peak_bytes"] for run in record["runs"]] == [1001, None]


def test_budgets_that_are_refused_or_not_held(tmp_path: Path) -> None:
    refusal = BudgetInfeasibleError(
        "nothing fits 1 KB", budget_bytes=1000, smallest_feasible_budget_bytes=1500, hint="--budget 1500"
    )
    ask = Processes(trgl_1000=refusal, trgl_2000=BudgetExceededError("not held"))
    result = compare(job(tmp_path), ["1KB", "2KB", "500"], ask=ask)
    refused, burst, over = list(rows_of(result).values())[4:]
    record = refused.to_dict()
    assert (record["status"], record["smallest_feasible_budget_bytes"]) == ("refused", 1500)
    assert record["reason"] == "nothing fits 1 KB; --budget 1500"
    assert burst.to_dict()["status"] == "did_not_fit"
    assert over.is_measured
    assert over.is_over
    text = "\n".join(plain(comparison_lines(result)))
    assert "TRGL, 1KB was refused: nothing fits 1 KB; --budget 1500" in text
    assert "TRGL, 500 went over its budget" in text


def test_a_run_that_did_not_end_is_a_failure(tmp_path: Path) -> None:
    ask = Processes()
    ask.report = dataclasses.replace(ask.report, status="paused", message="a pause was requested")
    record = rows_of(compare(job(tmp_path), ["1KB"], ask=ask))["trgl 1KB"].to_dict()
    assert (record["status"], record["reason"]) == ("failed", "the run is paused: a pause was requested")


@pytest.mark.parametrize(
    ("batch", "accumulate", "note"),
    [
        (32, 4, "4 micro-batches of 8"),
        (30, 4, "3 micro-batches of 10: a batch of 30 cannot be cut into 4"),
        (31, 4, "1 micro-batch of 31: a batch of 31 cannot be cut into 4"),
    ],
)
def test_the_row_says_what_was_accumulated(tmp_path: Path, batch: int, accumulate: int, note: str) -> None:
    result = compare(job(tmp_path, batch_size=batch), ["1KB"], accumulate=accumulate, ask=Processes())
    assert rows_of(result)["e2e_accumulate"].note == note
    assert note in " ".join(plain(comparison_lines(result)))
    assert {row.note for row in result.rows} == {note, ""}


def test_runs_are_kept_where_they_are_asked_for(tmp_path: Path) -> None:
    compare(job(tmp_path), ["1KB", "2 KB"], keep=True, repeat=2, ask=Processes())
    names = ["trgl-1KB-1", "trgl-1KB-2", "trgl-2-KB-1", "trgl-2-KB-2"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == names


@pytest.mark.parametrize("what", ["a run", "a file"])
def test_a_place_that_is_taken_is_refused_before_anything_is_measured(tmp_path: Path, what: str) -> None:
    place = tmp_path / "runs"
    if what == "a file":
        place.write_text("mine", encoding="utf-8")
    else:
        (place / "trgl-1KB").mkdir(parents=True)
        (place / "trgl-1KB" / "notes.txt").write_text("mine", encoding="utf-8")
    ask = Processes()
    with pytest.raises(RunDirError, match="runs") as caught:
        compare(job(tmp_path), ["1KB"], keep=True, ask=ask)
    assert "choose another" in caught.value.hint
    assert ask.asked == []


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"budgets": []}, UsageError, "no memory budget"),
        ({"budgets": ["1XB"]}, SizeError, "'1XB'"),
        ({"budgets": ["0"]}, SizeError, "'0'"),
        ({"budgets": ["1GB", "1000MB"]}, UsageError, "'1000MB' is there twice: 1GB, 1000MB"),
        ({"accumulate": 1}, UsageError, "accumulate = 1: expected a whole number of at least 2"),
        ({"accumulate": -4}, UsageError, "accumulate = -4"),
        ({"repeat": 0}, UsageError, "repeat = 0: expected a whole number of at least 1"),
        ({"model": "resnet-smal"}, UnknownNameError, "did you mean resnet-small"),
        ({"weights": "absent.pt"}, UsageError, "absent.pt"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    tmp_path: Path, arguments: dict[str, Any], kind: type[UsageError], words: str
) -> None:
    asked, ask = job(tmp_path), Processes()
    work = {name: value for name, value in arguments.items() if name in ("model", "weights")}
    asked = dataclasses.replace(asked, workload=dataclasses.replace(asked.workload, **work))
    given = {"budgets": ["1KB"]} | {name: value for name, value in arguments.items() if name not in work}
    with pytest.raises(kind, match=words) as caught:
        compare(asked, **given, ask=ask)
    assert caught.value.hint or "valid: " in caught.value.message
    assert ask.asked == []
    assert list(tmp_path.iterdir()) == []


def test_data_that_nobody_can_read_ends_it_at_once(tmp_path: Path) -> None:
    ask = Processes(plain=DataError("no such dataset"))
    with pytest.raises(DataError, match="no such dataset"):
        compare(job(tmp_path), ["1KB"], ask=ask)
    assert ask.asked == ["plain"]
    assert list(tmp_path.iterdir()) == []


def test_progress_names_each_row_and_its_outcome(tmp_path: Path) -> None:
    lines: list[str] = []
    refusal = BudgetInfeasibleError("too small", budget_bytes=1, smallest_feasible_budget_bytes=2, hint="more")
    compare(job(tmp_path), ["1KB"], repeat=2, say=lines.append, ask=Processes(trgl_1000=refusal))
    assert lines[:2] == ["[1/10] plain end-to-end ...", "[1/10] plain end-to-end: peak 1001 B, 1.0 s an epoch"]
    assert lines[8:10] == ["[5/10] TRGL, 1KB ...", "[5/10] TRGL, 1KB: refused: too small; more"]
    assert len(lines) == 18  # the refused row is not tried again


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_table_fits_the_terminal(tmp_path: Path, width: int) -> None:
    lines = plain(comparison_lines(compare(job(tmp_path), ["1KB", "600"], ask=Processes()), width))
    assert max(map(len, lines)) <= width
    assert any(line.startswith("TRGL, 1KB") and "0.50" in line for line in lines)


def test_what_waits_for_the_measured_processes_holds_no_torch(run_python: Callable[..., str]) -> None:
    run_python("import sys, ondevice_trgl.compare, ondevice_trgl.cli.compare; assert 'torch' not in sys.modules")
