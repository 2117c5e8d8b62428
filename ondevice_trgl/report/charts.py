"""The bars of the page, as SVG. Lengths are in percent, so that text keeps its size at every width."""

from collections.abc import Callable, Iterable, Mapping
from html import escape
from typing import NamedTuple

from ondevice_trgl.report.model import ModuleReport, Report
from ondevice_trgl.report.svg import key, line, mark, svg
from ondevice_trgl.report.table import format_seconds, shortened
from ondevice_trgl.units import format_size

_ROW = 44
"""Pixels of a bar with its label above."""
_PURPOSES = {
    "floor": "floor (Python, torch)",
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "head": "auxiliary head",
    "others": "other modules",
    "scratch": "kernels and allocator",
}
_SPENT = {
    "training": "training",
    "cache": "cache",
    "validation": "validation",
    "checkpoint": "checkpoints",
    "baseline": "baselines",
}


class Bar(NamedTuple):
    """A row of a chart; sizes in bytes, None where there is none."""

    label: str
    predicted: int | None
    measured: int | None
    note: str = ""


def bars_key(report: Report, *, predicted: bool) -> str:
    """What the colours and lines of `bars_chart` are."""
    marks = [mark("bar", "measured")] if report.measured_peak_bytes else []
    if predicted or report.measured_peak_bytes is None:
        marks.append(mark("ghost", "predicted"))
    marks.append(f'<span><i class="line"></i>budget {escape(format_size(report.budget_bytes))}</span>')
    marks.append(f'<span><i class="dash"></i>floor {escape(format_size(report.floor_bytes))}</span>')
    return key(marks)


def bars_chart(bars: Iterable[Bar], report: Report) -> str:
    """Peaks against the budget."""
    rows = list(bars)
    highest = max([report.budget_bytes, *(size for bar in rows for size in bar[1:3] if size is not None)])
    scale = 96 / highest
    parts = [_bar(bar, i * _ROW, scale, report.budget_bytes) for i, bar in enumerate(rows)]
    for kind, size in (("floor", report.floor_bytes), ("budget", report.budget_bytes)):
        # broken at the labels, which the line would strike through
        parts += [line(kind, size * scale, i * _ROW + 18, i * _ROW + 42) for i in range(len(rows))]
    label = f"Peak memory against a budget of {format_size(report.budget_bytes)}"
    return svg(max(len(rows) * _ROW, 1), label, parts)


def purposes_chart(report: Report) -> str:
    """Each module's predicted peak by what the bytes are for, and a line where it was measured."""
    rows = [one for one in report.heads if one.predicted_breakdown]
    if not rows:
        return ""
    highest = max(max(one.predicted_peak_bytes, one.measured_peak_bytes or 0) for one in rows)
    scale, parts = 96 / max(1, highest), []
    for i, one in enumerate(rows):
        parts.append(_label(f"{one.index}  {one.name}", _said(one), i * _ROW))
        given = one.predicted_breakdown or {}
        parts += _stacked({name: given.get(name, 0) for name in _PURPOSES}, scale, i * _ROW + 20, _size)
        if one.measured_peak_bytes is not None:
            parts.append(line("mark", one.measured_peak_bytes * scale, i * _ROW + 19, i * _ROW + 42))
    there = [name for name in _PURPOSES if any((one.predicted_breakdown or {}).get(name) for one in rows)]
    marks = [mark(f"own-{name}" if name == "floor" else name, _PURPOSES[name]) for name in there]
    if report.measured_peak_bytes is not None:
        marks.append('<span><i class="line"></i>measured</span>')
    return key(marks) + svg(len(rows) * _ROW, "Predicted memory of each module by purpose", parts)


def time_chart(report: Report) -> str:
    """What the time went to."""
    spent = {name: float(getattr(report.seconds, name)) for name in _SPENT}
    if not (total := sum(spent.values())):
        return ""
    there = {name: value for name, value in spent.items() if value}
    marks = [mark(name, f"{_SPENT[name]} {format_seconds(value)}") for name, value in there.items()]
    return key(marks) + svg(24, "Where the time went", _stacked(there, 100 / total, 2, format_seconds))


def _size(value: float) -> str:
    return format_size(int(value))


def _said(one: ModuleReport) -> str:
    figures = [one.measured_peak_bytes, one.predicted_peak_bytes]
    return " / ".join(format_size(size) for size in figures if size is not None)


def _stacked(sizes: Mapping[str, float], scale: float, top: int, told: Callable[[float], str | None]) -> list[str]:
    parts, x = [], 0.0
    for name, size in sizes.items():
        if size <= 0:
            continue
        width = size * scale
        color = "own-floor" if name == "floor" else name
        title = escape(f"{ {**_PURPOSES, **_SPENT}[name] }: {told(size)}")
        parts.append(
            f'<rect style="fill:var(--{color})" x="{x:.2f}%" y="{top}" width="{width:.2f}%" height="20">'
            f"<title>{title}</title></rect>"
        )
        x += width
    return parts


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
    parts.append(_label(bar.label, " / ".join(figures) or bar.note, top, over=over))
    return "".join(parts)


def _label(left: str, right: str, top: int, *, over: bool = False) -> str:
    return (
        f'<text x="0" y="{top + 14}">{escape(shortened(left, 24))}</text>'
        f'<text class="{"over" if over else "soft"}" x="100%" y="{top + 14}" text-anchor="end">{escape(right)}</text>'
    )


def _rect(kind: str, width: float, top: int, height: int) -> str:
    return f'<rect class="{kind}" x="0" y="{top}" width="{width:.2f}%" height="{height}" rx="2"/>'
