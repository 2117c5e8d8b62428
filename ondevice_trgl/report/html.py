"""A Report as one self-contained HTML page: no network, no script; light and dark, phone and print."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any, NamedTuple

from ondevice_trgl.report.ended import stopped_line
from ondevice_trgl.report.memory import memory_notes
from ondevice_trgl.report.model import Report
from ondevice_trgl.report.table import Span, Table, shortened
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

_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1b2027;--soft:#5d6774;--rule:#dfe3e8;
--bar:#3f6fd8;--ghost:#b9c9ee;--good:#1a7f45;--bad:#c0322b;--floor:#98a2b0}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--card:#1c2026;--ink:#e6e9ee;--soft:#9aa5b3;--rule:#323943;
--bar:#6f9cff;--ghost:#34456e;--good:#57c785;--bad:#ff7b72;--floor:#6b7684}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:960px;margin:0 auto;padding:24px 16px 48px}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:0 0 12px}
p{margin:0 0 8px}
section{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:16px;margin-top:16px}
.verdict{font-size:1.15rem;font-weight:600;border-left:5px solid var(--soft)}
.verdict.good{border-left-color:var(--good)}
.verdict.bad{border-left-color:var(--bad)}
.good{color:var(--good)}
.bad{color:var(--bad)}
.dim,.soft{color:var(--soft)}
.title{font-weight:600}
.note{font-size:.9rem;margin:10px 0 0}
.gap{height:12px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 10px;border-bottom:1px solid var(--rule);white-space:nowrap}
th{color:var(--soft);font-weight:500}
tr:last-child td{border-bottom:0}
th:first-child,td:first-child{padding-left:0}
.right{text-align:right}
svg{display:block;width:100%;font:13px system-ui,-apple-system,"Segoe UI",sans-serif}
svg text{fill:var(--ink)}
svg .soft{fill:var(--soft)}
svg .over{fill:var(--bad)}
.bar{fill:var(--bar)}
.bar.over{fill:var(--bad)}
.ghost{fill:var(--ghost)}
.budget{stroke:var(--ink);stroke-width:2}
.floor{stroke:var(--floor);stroke-width:1.5;stroke-dasharray:3 3}
.key{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.85rem;color:var(--soft);margin-bottom:10px}
.key i{display:inline-block;width:14px;height:10px;margin-right:6px;border-radius:2px}
.key i.line{height:14px;width:0;border-left:2px solid var(--ink);border-radius:0}
.key i.dash{height:14px;width:0;border-left:2px dashed var(--floor);border-radius:0}
dl{display:grid;grid-template-columns:minmax(8em,max-content) 1fr;gap:6px 16px;margin:0;font-size:.92rem}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
ul{margin:8px 0 0;padding-left:20px;font-size:.92rem}
@media screen and (max-width:560px){main{padding:16px 10px 32px}section{padding:12px}dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:8px}thead{display:none}
tr{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:0 20px;padding:8px 0;
border-bottom:1px solid var(--rule)}
tr:last-child{border-bottom:0}
td,td:first-child{display:flex;justify-content:space-between;gap:8px;border:0;padding:1px 0}
td:not(.right){grid-column:1/-1}td span{white-space:normal;overflow-wrap:anywhere;text-align:right}
td::before{content:attr(data-name);color:var(--soft);font-weight:400}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--soft:#444;--rule:#bbb;--bar:#3f6fd8;--ghost:#b9c9ee;
--good:#1a7f45;--bad:#c0322b;--floor:#888}
body{font-size:11pt;print-color-adjust:exact;-webkit-print-color-adjust:exact}
main{max-width:none;padding:0}section{break-inside:avoid}.scroll{overflow:visible}th,td{padding:3px 6px}}
"""


class Bar(NamedTuple):
    """A row of a chart; sizes in bytes, None where there is none."""

    label: str
    predicted: int | None
    measured: int | None
    note: str = ""


def to_html(report: Report) -> str:
    """The page. Every value from the report is escaped."""
    title, held = subject(report), verdict(report)
    modules = [Bar(f"{m.index}  {m.name}", m.predicted_peak_bytes, m.measured_peak_bytes) for m in report.heads]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{"planned for" if report.status == "planned" else "trained under"} a memory budget of '
        f"{escape(format_size(report.budget_bytes))}, one module at a time</p>",
        f'<section class="verdict {held.tone}">{escape(held.text)}</section>',
        _section("Peak memory", _key(report, predicted=False) + _chart(_strategies(report), report), _compared(report)),
        _section("Peak memory by module", _key(report, predicted=True) + _chart(modules, report)),
        _section("Modules", _table(module_table(report))),
        _section(
            "Plan", _facts({"budget": budget_line(report), "plan": plan_line(report)}), _list(report.plan.reasons)
        ),
        _section("Memory while training", _list(memory_notes(report))),
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
        _section("Data", _facts(dict(input_lines(report)))),
        _section("Work", _facts({**report.workload, "run directory": report.run_dir})),
        _section("Environment", _facts(report.environment)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}: memory report</title><style>{_STYLE}</style></head>\n"
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


def _key(report: Report, *, predicted: bool) -> str:
    marks = ['<span><i style="background:var(--bar)"></i>measured</span>'] if report.measured_peak_bytes else []
    if predicted or report.measured_peak_bytes is None:
        marks.append('<span><i style="background:var(--ghost)"></i>predicted</span>')
    marks.append(f'<span><i class="line"></i>budget {escape(format_size(report.budget_bytes))}</span>')
    marks.append(f'<span><i class="dash"></i>floor {escape(format_size(report.floor_bytes))}</span>')
    return f'<div class="key">{"".join(marks)}</div>'


def _chart(bars: Iterable[Bar], report: Report) -> str:
    """Labels above bars; lengths in percent, so that text keeps its size at every width."""
    rows = list(bars)
    highest = max([report.budget_bytes, *(size for bar in rows for size in bar[1:3] if size is not None)])
    scale = 96 / highest
    row_height, parts = 44, []
    for i, bar in enumerate(rows):
        parts.append(_bar(bar, i * row_height, scale, report.budget_bytes))
    height = max(len(rows) * row_height, 1)
    for kind, size in (("floor", report.floor_bytes), ("budget", report.budget_bytes)):
        # broken at the labels, which the line would strike through
        parts += [
            f'<line class="{kind}" x1="{size * scale:.2f}%" x2="{size * scale:.2f}%" '
            f'y1="{i * row_height + 18}" y2="{i * row_height + 42}"/>'
            for i in range(len(rows))
        ]
    label = f"Peak memory against a budget of {format_size(report.budget_bytes)}"
    return f'<svg height="{height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _bar(bar: Bar, top: int, scale: float, budget: int) -> str:
    parts = []
    figures = [format_size(size) for size in (bar.measured,) if size is not None]
    if bar.predicted is not None:
        figures.append(format_size(bar.predicted))
        parts.append(_rect("ghost", bar.predicted * scale, top + 20, 20))
    over = bar.measured is not None and bar.measured > budget
    if bar.measured is not None:
        thickness = 20 if bar.predicted is None else 10
        parts.append(_rect("bar over" if over else "bar", bar.measured * scale, top + 30 - thickness // 2, thickness))
    note = " / ".join(figures) or bar.note
    parts.append(f'<text x="0" y="{top + 14}">{escape(shortened(bar.label, 24))}</text>')
    parts.append(
        f'<text class="{"over" if over else "soft"}" x="100%" y="{top + 14}" text-anchor="end">{escape(note)}</text>'
    )
    return "".join(parts)


def _rect(kind: str, width: float, top: int, height: int) -> str:
    return f'<rect class="{kind}" x="0" y="{top}" width="{width:.2f}%" height="{height}" rx="2"/>'


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
