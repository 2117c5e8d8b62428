"""A Report as Markdown, for a pull request or a design review."""

import re

from ondevice_trgl.report.memory import memory_notes
from ondevice_trgl.report.model import Report
from ondevice_trgl.report.table import Span, Table
from ondevice_trgl.report.text import (
    accuracy_line,
    baseline_notes,
    budget_line,
    comparison_table,
    disk_line,
    gain_line,
    input_lines,
    module_table,
    plan_line,
    seconds_line,
    subject,
    verdict,
)

_MEANT = re.compile(r"([\\`*_\[\]<>|~#&])")
"""What would be read as Markdown, or HTML, in a value."""


def to_markdown(report: Report) -> str:
    """The page's figures, tables first. Every value from the report is escaped."""
    facts: dict[str, str | None] = {
        "budget": budget_line(report),
        "plan": plan_line(report),
        report.metric: accuracy_line(report),
        "against end-to-end": gain_line(report),
        "time": seconds_line(report),
        "disk": disk_line(report),
        **dict(input_lines(report)),
    }
    parts = [
        f"### {_escaped(subject(report))}",
        f"**{_escaped(verdict(report).text)}**",
        _table(comparison_table(report)) if report.baselines or report.measured_peak_bytes else "",
        _list(baseline_notes(report)),
        _table(module_table(report)),
        "\n".join(f"- {_escaped(name)}: {_escaped(text)}" for name, text in facts.items() if text),
        _list([*report.plan.reasons, *memory_notes(report)]),
        _fenced(str(report.workload.get("command") or "")),
        f"torch {_escaped(str(report.environment.get('torch', '?')))}, "
        f"{_escaped(str(report.environment.get('platform', '?')))}, meter {_escaped(report.meter)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(table: Table) -> str:
    rows = [table.headings, *(tuple(map(_cell, row)) for row in table.rows)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, f"|{'|'.join('---:' if right else '---' for right in table.right)}|")
    return "\n".join(lines)


def _cell(span: Span) -> str:
    text = _escaped(span.text)
    return f"**{text}**" if span.tone in ("title", "bad") and text.strip() else text


def _list(items: list[str]) -> str:
    return "\n".join(f"- {_escaped(item)}" for item in items)


def _fenced(text: str) -> str:
    """A command as it is; a fence longer than any in it."""
    if not text:
        return ""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}console\n$ {' '.join(text.split())}\n{fence}"


def _escaped(text: str) -> str:
    return _MEANT.sub(r"\\\1", " ".join(text.split()))
