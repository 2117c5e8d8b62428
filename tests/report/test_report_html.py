"""The page: whole, small, escaped, and with the same figures as the text."""

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ondevice_trgl.report.html import to_html
from ondevice_trgl.report.model import Report
from ondevice_trgl.report.table import Table
from ondevice_trgl.report.text import comparison_table, module_table, verdict

VOID = {"meta", "rect", "line", "br"}


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
