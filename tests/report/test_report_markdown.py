"""Markdown for a review: the same figures as the text, and nothing in it that a value has brought along."""

import dataclasses
import json
from pathlib import Path

import pytest

from ondevice_trgl.report.markdown import to_markdown
from ondevice_trgl.report.model import Report
from ondevice_trgl.report.text import comparison_table, module_table, verdict


@pytest.fixture
def report() -> Report:
    return Report.from_dict(json.loads((Path(__file__).parent / "sample.json").read_text(encoding="utf-8")))


def test_every_figure_is_there_and_tables_are_whole(report: Report) -> None:
    text = to_markdown(report)
    plain = text.replace("\\", "")
    assert verdict(report).text in plain
    for table in (comparison_table(report), module_table(report)):
        for row in table.rows:
            assert all(span.text in plain for span in row)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    counts = {line.replace("\\|", "").count("|") for line in rows}
    assert counts == {len(comparison_table(report).headings) + 1, len(module_table(report).headings) + 1}
    assert all(f"- {reason}" in plain for reason in report.plan.reasons)


def test_what_a_value_brings_is_no_markup(report: Report) -> None:
    evil = "<img src=x> **a** | `b` [c](d)\n# e"
    modules = (dataclasses.replace(report.modules[0], name=evil), *report.modules[1:])
    text = to_markdown(dataclasses.replace(report, modules=modules, workload={"command": "run ```` x\ny"}))
    assert "<img" not in text.replace(r"\<img", "")
    assert "\n# e" not in text
    assert r"\<img src=x\> \*\*a\*\* \| \`b\` \[c\](d) \# e" in text
    assert "`````console\n$ run ```` x y\n`````" in text
