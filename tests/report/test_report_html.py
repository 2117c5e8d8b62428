"""The page: whole, small, escaped, and with the same figures as the text."""

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ondevice_trgl.report import charts, plots
from ondevice_trgl.report.html import to_html
from ondevice_trgl.report.model import Report, SecondsReport
from ondevice_trgl.report.table import Table
from ondevice_trgl.report.text import comparison_table, module_table, verdict

VOID = {"meta", "br"}


@pytest.fixture
def report() -> Report:
    return Report.from_dict(json.loads((Path(__file__).parent / "sample.json").read_text(encoding="utf-8")))


class Page(HTMLParser):
    """Checks that tags nest; keeps the text, the tags and their attributes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def find(self, tag: str, kind: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag and attrs.get("class") == kind]


def figures(*tables: Table) -> set[str]:
    return {span.text for table in tables for row in table.rows for span in row}


def test_whole_small_and_alone(report: Report) -> None:
    assert "30 TB" not in to_html(report)
    worn = dataclasses.replace(report, written_bytes=30 * 10**6, flash_endurance_bytes=30 * 10**12)
    assert "one run is 0.0001% of the 30 TB that the flash memory stands" in to_html(worn)
    source = to_html(report)
    page = Page(source)
    assert page.open == []
    assert len(source.encode()) < 100_000
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert "http" not in source
    assert "url(" not in source
    assert "prefers-color-scheme:dark" in source
    assert "@media print" in source


def test_every_figure_of_the_tables_is_there(report: Report) -> None:
    texts = set(Page(to_html(report)).texts)
    assert figures(module_table(report), comparison_table(report)) <= texts
    assert verdict(report).text in texts
    assert set(report.plan.reasons) <= texts


def test_values_are_escaped(report: Report) -> None:
    evil = "<script>alert('&\"')</script>"
    hostile = dataclasses.replace(
        report,
        modules=(dataclasses.replace(report.modules[0], name=evil), *report.modules[1:]),
        workload={"model": evil, evil: evil},
        environment={evil: evil},
        plan=dataclasses.replace(report.plan, reasons=(evil,), optimizer=evil),
        status="failed",
        message=evil,
        run_dir=evil,
    )
    source = to_html(hostile)
    page = Page(source)
    assert page.open == []
    assert "<script" not in source
    assert any(evil in text for text in page.texts)


def test_bars_are_to_scale(report: Report) -> None:
    page = Page(to_html(report))
    budget = {attrs["x1"] for attrs in page.find("line", "budget")}
    assert len(budget) == 2  # one a chart
    over, held = page.find("rect", "bar over"), page.find("rect", "bar")
    assert len(over) == 1
    widths = [float((attrs["width"] or "").rstrip("%")) for attrs in (*over, *held)]
    assert max(widths) == widths[0] == 96
    own = report.measured_peak_bytes or 0
    e2e = report.baselines["e2e"].measured_peak_bytes or 1
    assert widths[1] == pytest.approx(96 * own / e2e, abs=0.01)


def test_a_plan_shows_predictions_alone(report: Report) -> None:
    modules = tuple(dataclasses.replace(module, measured_peak_bytes=None) for module in report.modules)
    plan = dataclasses.replace(report, status="planned", measured_peak_bytes=None, modules=modules, baselines={})
    page = Page(to_html(plan))
    assert page.find("rect", "bar") == page.find("rect", "bar over") == []
    assert len(page.find("rect", "ghost")) == 1 + len(modules)
    assert "None" not in " ".join(page.texts)


def test_the_bytes_of_a_prediction_add_up_to_it(report: Report) -> None:
    given = {"floor": 100, "weights": 40, "scratch": 60, "gradients": 0}
    rows = tuple(
        dataclasses.replace(one, predicted_peak_bytes=200, measured_peak_bytes=150, predicted_breakdown=given)
        for one in report.modules
    )
    page = Page(charts.purposes_chart(dataclasses.replace(report, modules=rows, classifier=None)))
    widths = [float((attrs["width"] or "").rstrip("%")) for tag, attrs in page.tags if tag == "rect"]
    assert widths == [48.0, 19.2, 28.8] * len(rows)  # of the largest 96
    assert {attrs["x1"] for attrs in page.find("line", "mark")} == {"72.00%"}
    assert "gradients" not in page.texts
    assert "weights" in page.texts
    bare = tuple(dataclasses.replace(one, predicted_breakdown=None) for one in report.modules)
    assert charts.purposes_chart(dataclasses.replace(report, modules=bare, classifier=None)) == ""


def test_the_chosen_head_stands_out_among_those_of_all_depths(report: Report) -> None:
    values = (0.5, 0.9, None, 0.7)
    heads = tuple(
        dataclasses.replace(report.modules[0], index=i, val_accuracy=value, train_accuracy=0.8 if value else None)
        for i, value in enumerate(values)
    )
    accuracy = dataclasses.replace(report.accuracy, best_head=1)
    page = Page(plots.accuracy_chart(dataclasses.replace(report, modules=heads, classifier=None, accuracy=accuracy)))
    assert len(page.find("circle", "dot")) == 2
    (chosen,) = page.find("circle", "dot chosen")
    heights = {int(attrs["cy"] or 0): attrs["cx"] for attrs in page.find("circle", "dot")}
    assert int(chosen["cy"] or 0) < min(heights)  # up is better
    assert sorted(heights, key=lambda y: float((heights[y] or "").rstrip("%")))[0] == max(heights)
    assert {"50.0%", "90.0%", "module 0", "module 3"} <= set(page.texts)
    alone = dataclasses.replace(report, modules=heads[:1], classifier=None)
    assert plots.accuracy_chart(alone) == ""


def test_the_choices_of_a_plan_with_the_one_that_was_made(report: Report) -> None:
    sizes = (400, 300, 200)
    choices = tuple(
        {
            "modules": i + 2, "micro_batch": 32, "checkpointed": i == 2, "cache_dtype": "fp32",
            "predicted_peak_bytes": size, "seconds_per_epoch": float(9 - i), "cache_bytes": 7,
        }
        for i, size in enumerate(sizes)
    )  # fmt: skip
    plan = dataclasses.replace(
        report.plan, num_modules=3, micro_batch_size=32, activation_checkpointing=False,
        cache=dataclasses.replace(report.plan.cache, dtype="fp32"),
    )  # fmt: skip
    planned = dataclasses.replace(report, pareto=choices, budget_bytes=350, plan=plan)
    page = Page(plots.choices_chart(planned))
    assert len(page.find("circle", "dot chosen")) == len(page.find("circle", "dot pale")) == 1
    assert {"9 s an epoch", "7 s an epoch"} <= set(page.texts)
    untimed = tuple({**one, "seconds_per_epoch": None} for one in choices)
    assert "4 modules" in Page(plots.choices_chart(dataclasses.replace(planned, pareto=untimed))).texts
    assert plots.choices_chart(dataclasses.replace(planned, pareto=choices[:1])) == ""


def test_where_the_time_went_is_all_of_it(report: Report) -> None:
    spent = dataclasses.replace(report.seconds, training=30.0, cache=10.0, validation=0.0, checkpoint=8.0, baseline=2.0)
    page = Page(charts.time_chart(dataclasses.replace(report, seconds=spent)))
    widths = [float((attrs["width"] or "").rstrip("%")) for tag, attrs in page.tags if tag == "rect"]
    assert widths == [60.0, 20.0, 16.0, 4.0]
    assert {"training 30 s", "checkpoints 8.0 s"} <= set(page.texts)
    assert charts.time_chart(dataclasses.replace(report, seconds=SecondsReport())) == ""


def test_memory_over_time_with_the_budget_and_where_modules_begin(report: Report) -> None:
    points = tuple({"seconds": float(i), "bytes": 100 * (i + 1), "module": i // 2} for i in range(5))
    held = dataclasses.replace(report, timeline=points, budget_bytes=1000, floor_bytes=250)
    page = Page(plots.timeline_chart(held))
    assert len(page.find("line", "path")) == 4
    assert len(page.find("line", "band")) == 2
    (budget,), (floor,) = page.find("line", "budget"), page.find("line", "floor")
    assert int(budget["y1"] or 0) < int(floor["y1"] or 0)
    assert page.find("circle", "dot") == []
    assert plots.timeline_chart(dataclasses.replace(held, timeline=points[:2])) == ""
