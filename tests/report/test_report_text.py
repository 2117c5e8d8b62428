"""The report as text: figures that were measured, words for those that were not."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ondevice_trgl.report.model import AccuracyReport, BaselineReport, Report
from ondevice_trgl.report.table import (
    Span,
    format_count,
    format_fraction,
    format_seconds,
    make_table,
    plain,
    table_lines,
)
from ondevice_trgl.report.text import (
    accuracy_line,
    breakdown_table,
    comparison_table,
    module_table,
    pareto_table,
    report_lines,
    seconds_line,
    verdict,
)

MIB = 1 << 20


@pytest.fixture
def report() -> Report:
    return Report.from_dict(json.loads((Path(__file__).parent / "sample.json").read_text(encoding="utf-8")))


def changed(report: Report, **values: Any) -> Report:
    return dataclasses.replace(report, **values)


def planned(report: Report) -> Report:
    """The same report before anything was measured."""
    unmeasured: dict[str, Any] = {f.name: None for f in dataclasses.fields(report.modules[0]) if f.default is None}
    modules = tuple(dataclasses.replace(module, **unmeasured) for module in report.modules)
    accuracy = AccuracyReport()
    return changed(report, status="planned", measured_peak_bytes=None, modules=modules, baselines={}, accuracy=accuracy)


def rows(report: Report) -> dict[str, list[str]]:
    return {row[0].text: [span.text for span in row] for row in comparison_table(report).rows}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, None),
        (0.0, "0.00 s"),
        (0.994, "0.99 s"),
        (0.999, "1.0 s"),
        (9.96, "10 s"),
        (59.6, "1m 00s"),
        (61.2, "1m 01s"),
        (3599.7, "1h 00m"),
        (7384, "2h 03m"),
    ],
)
def test_seconds_coarsen(seconds: float | None, text: str | None) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (12_345, "12.3k"), (11_181_642, "11.2M"), (2 * 10**9, "2G")],
)
def test_counts(count: int, text: str) -> None:
    assert format_count(count) == text


def test_an_absent_fraction_is_not_zero() -> None:
    assert format_fraction(None) is None
    assert format_fraction(0.0) == "0.0%"


@pytest.mark.parametrize("width", [80, 100, 200])
def test_fits_the_terminal(report: Report, width: int) -> None:
    lines = plain(report_lines(report, width))
    assert max(map(len, lines)) <= width
    assert all(line.isascii() for line in lines)


def test_long_names_are_cut_in_the_middle_and_whole_where_there_is_room(report: Report) -> None:
    name = "features.stage3.block12.branch1..features.stage4.block1.branch2"
    long = changed(report, modules=(dataclasses.replace(report.modules[0], name=name), *report.modules[1:]))
    narrow, wide = (plain(table_lines(module_table(long), width)) for width in (80, 200))
    assert max(map(len, narrow)) <= 80
    assert name not in "\n".join(narrow)
    assert any(re.search(r" fea\S+\.\.\S*branch2 ", line) for line in narrow)
    assert any(name in line for line in wide)


def test_columns_line_up(report: Report) -> None:
    lines = plain(table_lines(module_table(report), 100))[1:]
    ends = {line.index(word) + len(word) for line, word in zip(lines, ["measured", "529 MiB", "505 MiB"], strict=False)}
    assert len(ends) == 1


def test_none_is_never_a_figure(report: Report) -> None:
    for shown in (report, planned(report)):
        assert "None" not in "\n".join(plain(report_lines(shown, 100)))
    last = module_table(report).rows[-1]
    assert last[-1].text == "-"


def test_a_plan_has_no_measured_columns(report: Report) -> None:
    table = module_table(planned(report))
    assert table.headings == ("#", "module", "params", "predicted")
    text = "\n".join(plain(report_lines(planned(report), 100)))
    assert "measured" not in text
    assert "Fits the budget: predicted peak 540 MiB of 572 MiB." in text
    assert report.plan.reasons[0] in text


def test_baselines_beside_trgl(report: Report) -> None:
    table = rows(report)
    assert table["end-to-end"][2:] == ["1.32 GiB", "over by 780 MiB", "30 s", "60.9%"]
    assert table["checkpointed end-to-end"][2:] == ["did not fit", "-", "-", "-"]
    assert table["TRGL"][1:5] == ["32 (16)", "529 MiB", "under by 43 MiB", "29 s"]
    assert "killed by the system after 3 steps" in "\n".join(plain(report_lines(report, 100)))


def test_a_skipped_baseline_says_so(report: Report) -> None:
    skipped = BaselineReport(status="skipped", batch_size=32, micro_batch_size=32, reason="--baseline skip")
    shown = changed(report, baselines={"e2e": skipped, "e2e_checkpoint": skipped})
    assert rows(shown)["end-to-end"][2] == "skipped"
    assert "%" not in verdict(shown).text
    assert "End-to-end was skipped: --baseline skip" in "\n".join(plain(report_lines(shown, 100)))


def test_verdict_counts_the_saving(report: Report) -> None:
    assert verdict(report) == Span(
        "Held the budget: measured peak 529 MiB of 572 MiB; 61% less than end-to-end, "
        "checkpointed end-to-end did not fit.",
        "good",
    )


def test_verdict_owns_up_to_a_loss(report: Report) -> None:
    worse = dataclasses.replace(report.baselines["e2e"], measured_peak_bytes=400 * MIB)
    shown = changed(report, measured_peak_bytes=600 * MIB, baselines={"e2e": worse})
    assert verdict(shown) == Span(
        "Went over the budget: measured peak 600 MiB of 572 MiB; 50% more than end-to-end.", "bad"
    )
    assert comparison_table(shown).rows[-1][3] == Span("over by 28 MiB", "bad")


def test_verdict_of_what_did_not_end(report: Report) -> None:
    paused = changed(report, status="paused", message="SIGINT", measured_peak_bytes=None)
    assert verdict(paused).text == "Paused (SIGINT): no peak was measured."
    failed = changed(report, status="failed", message="disk full")
    assert verdict(failed) == Span("Failed (disk full): measured peak 529 MiB of 572 MiB.", "bad")


def test_one_row_more_than_the_budget_is_over(report: Report) -> None:
    exact = changed(report, measured_peak_bytes=report.budget_bytes)
    assert verdict(exact).tone == "good"
    assert verdict(changed(exact, measured_peak_bytes=report.budget_bytes + 1)).tone == "bad"


def test_a_table_keeps_empty_columns_only_when_it_has_no_rows() -> None:
    assert make_table("t", ("a", "<b"), []).headings == ("a", "b")
    assert make_table("t", ("a", "<b"), [("1", None), ("2", None)]).headings == ("a",)


def test_what_else_could_be_chosen_is_a_table_whose_unknown_seconds_stay_unknown(report: Report) -> None:
    known = {
        "modules": 3, "micro_batch": 16, "checkpointed": True, "cache_dtype": "bf16",
        "predicted_peak_bytes": report.budget_bytes + 1, "seconds_per_epoch": 12.0, "cache_bytes": 5 * MIB,
    }  # fmt: skip
    shown = changed(report, pareto=(known, {**known, "seconds_per_epoch": None}))
    assert Report.from_dict(shown.to_dict()) == shown
    first, second = pareto_table(shown).rows
    for text in ("3", "16", "yes", "bf16", "12 s", "5.0 MiB"):
        assert text in str(first)
    assert "12 s" not in str(second)
    assert "bad" in str(first)


def test_what_the_predicted_bytes_are_for_is_a_row_a_module(report: Report) -> None:
    parts = {"weights": 2 * MIB, "scratch": 3 * MIB, "floor": 5 * MIB}
    modules = tuple(dataclasses.replace(module, predicted_breakdown=parts) for module in report.modules)
    table = breakdown_table(changed(report, modules=modules))
    assert len(table.rows) == len(modules)
    assert all(text in str(table.rows[0]) for text in ("2.0 MiB", "3.0 MiB", "5.0 MiB"))
    assert breakdown_table(report).rows == ()


def judged(report: Report, *, own: float | None = 0.86) -> Report:
    """`report` with a classifier of its own and an end-to-end training that was done to the end."""
    classifier = dataclasses.replace(
        report.modules[-1], index=5, name="avgpool..fc", val_accuracy=0.87, test_accuracy=own
    )
    trained = dataclasses.replace(report.baselines["e2e"], epochs=3, val_accuracy=0.9, test_accuracy=0.885)
    accuracy = dataclasses.replace(report.accuracy, last_head_val=0.87, last_module_val=0.88, head="mlp")
    baselines = {**report.baselines, "e2e": trained}
    return changed(report, classifier=classifier, baselines=baselines, accuracy=accuracy)


def test_accuracy_stands_beside_memory_where_end_to_end_was_trained(report: Report) -> None:
    shown = judged(report)
    assert shown.gains == {"best_head": pytest.approx(-0.0125), "own_classifier": pytest.approx(-0.025)}
    table = rows(shown)
    assert [table[name][-1] for name in ("end-to-end", "checkpointed end-to-end", "TRGL")] == ["88.5%", "-", "87.2%"]
    text = " ".join(" ".join(plain(report_lines(shown, 100))).split())
    assert "test 88.5% end-to-end, after as many epochs (3)" in text
    assert "the best head is 1.2 points below" in text
    assert "which end-to-end has too, 2.5 points below" in text
    assert max(map(len, plain(report_lines(shown, 80)))) <= 80
    assert Report.from_dict(json.loads(json.dumps(shown.to_dict()))) == shown


def test_without_that_it_says_that_accuracy_was_not_compared(report: Report) -> None:
    assert report.gains == {"best_head": None, "own_classifier": None}
    text = "\n".join(plain(report_lines(report, 100)))
    assert "against end-to-end not measured; --baseline full" in text
    assert comparison_table(report).headings[-1] == "saving"
    assert "against end-to-end" not in "\n".join(plain(report_lines(planned(report), 100)))


def test_heads_of_one_kind_and_the_networks_own(report: Report) -> None:
    shown = judged(report)
    row = [span.text for span in module_table(shown).rows[-1]]
    assert row[:2] == ["5", "avgpool..fc (own classifier)"]
    line = accuracy_line(shown)
    assert line is not None
    assert "last module's head 88.0% (mlp, as those before it), own classifier 87.0%" in line
    best = changed(shown, accuracy=dataclasses.replace(shown.accuracy, best_head=5))
    assert "(the network's own classifier)" in str(accuracy_line(best))
    counted = changed(shown, workload={"samples": {"train": 9, "val": 1, "test": 1000}})
    assert str(accuracy_line(counted)).endswith(" (1 validation and 1,000 test samples)")


def test_what_was_rested_is_a_part_of_the_time(report: Report) -> None:
    assert "rested" not in str(seconds_line(report))
    rested = dataclasses.replace(report, system={"waited_for_nice": 90.0, "waited_for_heat": 30.0})
    assert str(seconds_line(rested)).endswith("rested as asked 1m 30s, too hot 30 s)")
