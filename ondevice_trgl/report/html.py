"""A Report as one self-contained HTML page: no network, no script; light and dark, phone and print."""

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from ondevice_trgl.report.charts import Bar, bars_chart, bars_key, purposes_chart, time_chart
from ondevice_trgl.report.ended import stopped_line
from ondevice_trgl.report.memory import memory_notes
from ondevice_trgl.report.model import Report
from ondevice_trgl.report.plots import accuracy_chart, choices_chart, timeline_chart
from ondevice_trgl.report.table import Span, Table
from ondevice_trgl.report.text import (
    STRATEGIES,
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
from ondevice_trgl.tasks import metric_title
from ondevice_trgl.units import format_size

_STYLE = Path(__file__).with_name("page.css")


def to_html(report: Report) -> str:
    """The page. Every value from the report is escaped."""
    title, held = subject(report), verdict(report)
    modules = [Bar(f"{m.index}  {m.name}", m.predicted_peak_bytes, m.measured_peak_bytes) for m in report.heads]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{"planned for" if report.status == "planned" else "trained under"} a memory budget of '
        f"{escape(format_size(report.budget_bytes))}, one module at a time</p>",
        f'<section class="verdict {held.tone}">{escape(held.text)}</section>',
        _section(
            "Peak memory",
            bars_key(report, predicted=False) + bars_chart(_strategies(report), report),
            _compared(report),
        ),
        _section("Peak memory by module", bars_key(report, predicted=True) + bars_chart(modules, report)),
        _section("What the predicted bytes are for", purposes_chart(report)),
        _section("Modules", _table(module_table(report))),
        _section(f"{metric_title(report.metric).capitalize()} by depth", accuracy_chart(report)),
        _section(
            "Plan", _facts({"budget": budget_line(report), "plan": plan_line(report)}), _list(report.plan.reasons)
        ),
        _section("Other choices", choices_chart(report)),
        _section("Memory while training", timeline_chart(report), _list(memory_notes(report))),
        _section(
            "Results",
            _facts(
                {
                    metric_title(report.metric): accuracy_line(report),
                    "against end-to-end": gain_line(report),
                    "stopped": stopped_line(report),
                    "time": seconds_line(report),
                    "disk": disk_line(report),
                }
            ),
        ),
        _section("Time", time_chart(report)),
        _section("Data", _facts(dict(input_lines(report)))),
        _section("Work", _facts({**report.workload, "run directory": report.run_dir})),
        _section("Environment", _facts(report.environment)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}: memory report</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head>\n"
        f"<body><main>\n{''.join(f'{part}{chr(10)}' for part in parts if part)}</main></body></html>\n"
    )


def _section(heading: str, *parts: str) -> str:
    body = "".join(parts)
    return f"<section><h2>{escape(heading)}</h2>{body}</section>" if body else ""


def _strategies(report: Report) -> list[Bar]:
    absent = {"did_not_fit": "did not fit", "skipped": "skipped"}
    bars = [
        Bar(label, None, base.measured_peak_bytes, absent.get(base.status, "not measured"))
        for name, label in STRATEGIES.items()
        if (base := report.baselines.get(name)) is not None
    ]
    if report.measured_peak_bytes is None:
        return [*bars, Bar("TRGL (predicted)", report.predicted_peak_bytes, None)]
    return [*bars, Bar("TRGL", None, report.measured_peak_bytes)]


def _compared(report: Report) -> str:
    notes = "".join(f'<p class="note soft">{escape(note)}</p>' for note in baseline_notes(report))
    return (
        f'<div class="gap"></div>{_table(comparison_table(report))}{notes}'
        if report.baselines or report.measured_peak_bytes
        else ""
    )


def _table(table: Table) -> str:
    sides = ["right" if right else "" for right in table.right]
    head = "".join(f'<th class="{side}">{escape(name)}</th>' for side, name in zip(sides, table.headings, strict=True))
    rows = "".join(f"<tr>{_row(row, sides, table.headings)}</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _row(row: Iterable[Span], sides: Iterable[str], names: Iterable[str]) -> str:
    """`data-name` is the heading, which a phone shows beside the figure."""
    return "".join(
        f'<td class="{f"{side} {span.tone}".strip()}" data-name="{escape(name)}"><span>{escape(span.text)}</span></td>'
        for span, side, name in zip(row, sides, names, strict=True)
    )


def _facts(facts: Mapping[str, Any]) -> str:
    known = [(name, value) for name, value in facts.items() if value is not None]
    if not known:
        return ""
    rows = "".join(f"<dt>{escape(_name(name))}</dt><dd>{escape(_value(name, value))}</dd>" for name, value in known)
    return f"<dl>{rows}</dl>"


def _name(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _value(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_name(str(key))} {_value(str(key), part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(str(part) for part in value)
    return format_size(value) if name.endswith("_bytes") and isinstance(value, int) else str(value)


def _list(items: Iterable[str]) -> str:
    rows = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{rows}</ul>" if rows else ""
