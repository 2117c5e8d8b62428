"""The plots of the page: memory over time, accuracy by depth, the choices of a plan."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

from ondevice_trgl.report.model import Report
from ondevice_trgl.report.svg import key, mark, svg
from ondevice_trgl.report.table import format_seconds
from ondevice_trgl.tasks import metric_title
from ondevice_trgl.units import format_size

_PLOT = 180
"""Pixels of a plot with points."""
_LEFT, _RIGHT = 13.0, 97.0
"""Percent of the width between which points lie."""


class Point(NamedTuple):
    """In a plot; `x` and `y` from 0 to 1."""

    x: float
    y: float
    kind: str
    title: str


def timeline_chart(report: Report) -> str:
    """What the process held over time, module by module."""
    points = report.timeline
    if len(points) < 3:
        return ""
    start, end = points[0]["seconds"], max(points[-1]["seconds"], points[0]["seconds"] + 0.01)
    highest = max([float(report.budget_bytes), *(point["bytes"] for point in points)])
    shown = [Point((p["seconds"] - start) / (end - start), p["bytes"] / highest, "", "") for p in points]
    bands = []
    for at, (point, place) in enumerate(zip(points, shown, strict=True)):
        if at and point["module"] != points[at - 1]["module"]:
            told = f"module {int(point['module'])} from {format_seconds(point['seconds'])} on"
            bands.append(
                f'<line class="band" x1="{_across(place.x)}" x2="{_across(place.x)}" y1="20" y2="{_PLOT - 12}">'
                f"<title>{escape(told)}</title></line>"
            )
    lines = [
        f'<line class="{kind}" x1="{_LEFT}%" x2="{_RIGHT}%" y1="{_down(size / highest)}" y2="{_down(size / highest)}"/>'
        for kind, size in (("floor", report.floor_bytes), ("budget", report.budget_bytes))
        if size <= highest
    ]
    marks = [
        mark("bar", "held by the process"),
        f'<span><i class="line"></i>budget {escape(format_size(report.budget_bytes))}</span>',
        f'<span><i class="dash"></i>floor {escape(format_size(report.floor_bytes))}</span>',
        '<span><i class="thin"></i>next module</span>',
    ]
    under = [format_seconds(start) or "", format_seconds(end) or ""]
    grid = [(1.0, format_size(int(highest))), (0.0, "0")]
    return key(marks) + _plot([shown], grid, under, "Memory over time", joined=True, dots=False, behind=bands + lines)


def accuracy_chart(report: Report) -> str:
    """What the head of each module reaches on validation and training data, one behind the other."""
    rows = [one for one in report.heads if one.val_accuracy is not None or one.train_accuracy is not None]
    if len(rows) < 2:
        return ""
    values = [value for one in rows for value in (one.val_accuracy, one.train_accuracy) if value is not None]
    low, high = min(values), max(values)
    margin = max(0.1 * (high - low), 0.01)
    low, high = low - margin, high + margin

    def points(kind: str, of: Sequence[float | None]) -> list[Point]:
        places = enumerate(zip(rows, of, strict=True))
        return [
            Point(i / (len(rows) - 1), (value - low) / (high - low), kind, f"{one.index} {one.name}: {_share(value)}")
            for i, (one, value) in places
            if value is not None
        ]

    best = report.accuracy.best_head
    trained = points("pale", [one.train_accuracy for one in rows])
    judged = points("", [one.val_accuracy for one in rows])
    if judged and len(judged) == len(rows):
        judged = [
            point._replace(kind="chosen") if one.index == best else point
            for point, one in zip(judged, rows, strict=True)
        ]
    ends = [(low + margin, _share(low + margin)), (high - margin, _share(high - margin))]
    grid = [((value - low) / (high - low), text) for value, text in ends]
    marks = [mark("bar", "validation"), mark("floor", "training"), mark("good", "chosen head")]
    label = f"{metric_title(report.metric)} of each module's head"
    under = [f"module {rows[0].index}", "own classifier" if report.classifier else f"module {rows[-1].index}"]
    return key(marks) + _plot([trained, judged], grid, under, label, joined=True)


def choices_chart(report: Report) -> str:
    """The choices that no other beats: predicted peak against seconds an epoch, or the number of modules."""
    choices = report.pareto
    timed = [one for one in choices if one["seconds_per_epoch"] is not None]
    by_time = len(timed) > 2
    shown = timed if by_time else choices
    if len(shown) < 2:
        return ""
    sizes = [float(one["predicted_peak_bytes"]) for one in shown]
    heights = [float(one["seconds_per_epoch"] if by_time else one["modules"]) for one in shown]
    if min(heights) == max(heights):
        return ""
    points = [
        Point(_within(size, sizes), _within(height, heights), _kind(report, one), _told(one))
        for size, height, one in zip(sizes, heights, shown, strict=True)
    ]
    unit = "{:.3g} s an epoch" if by_time else "{:.0f} modules"
    grid = [(0.05, unit.format(min(heights))), (0.95, unit.format(max(heights)))]
    marks = [mark("bar", "fits the budget"), mark("floor", "does not"), mark("good", "the plan")]
    under = [format_size(int(min(sizes))), f"{format_size(int(max(sizes)))} predicted peak"]
    return key(marks) + _plot([points], grid, under, "Choices that no other beats", joined=False)


def _kind(report: Report, one: Mapping[str, Any]) -> str:
    """Whether it is what was planned, or could have been."""
    plan = report.plan
    planned = plan.num_modules, plan.micro_batch_size, plan.activation_checkpointing, plan.cache.dtype
    if planned == (one["modules"], one["micro_batch"], one["checkpointed"], one["cache_dtype"]):
        return "chosen"
    return "" if one["predicted_peak_bytes"] <= report.budget_bytes else "pale"


def _told(one: Mapping[str, Any]) -> str:
    seconds = one["seconds_per_epoch"]
    return (
        f"{one['modules']} modules, micro-batch {one['micro_batch']}{', checkpointed' if one['checkpointed'] else ''}, "
        f"cache {one['cache_dtype']}: {format_size(one['predicted_peak_bytes'])}"
        f"{'' if seconds is None else f', {seconds:.3g} s an epoch'}, {format_size(one['cache_bytes'])} on disk"
    )


def _within(value: float, values: Sequence[float]) -> float:
    low, high = min(values), max(values)
    return 0.5 if low == high else 0.05 + 0.9 * (value - low) / (high - low)


def _share(value: float) -> str:
    return f"{100 * value:.1f}%" if 0.0 <= value <= 1.0 else f"{value:.3g}"


def _plot(
    lines: Sequence[Sequence[Point]],
    grid: Sequence[tuple[float, str]],
    under: Sequence[str],
    label: str,
    *,
    joined: bool,
    dots: bool = True,
    behind: Sequence[str] = (),
) -> str:
    """Points in a frame; `grid` are heights (0 to 1) with their names, `under` the ends of the axis below."""
    parts = list(behind)
    for height, name in grid:
        y = _down(height)
        parts.append(f'<line class="axis" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="soft" x="0" y="{y - 5}">{escape(name)}</text>')
    for line in lines:
        for one, other in pairwise(line) if joined else ():
            pale = " pale" if one.kind == other.kind == "pale" else ""
            parts.append(
                f'<line class="path{pale}" x1="{_across(one.x)}" y1="{_down(one.y)}" '
                f'x2="{_across(other.x)}" y2="{_down(other.y)}"/>'
            )
        parts += [
            f'<circle class="{f"dot {one.kind}".strip()}" cx="{_across(one.x)}" cy="{_down(one.y)}" r="5">'
            f"<title>{escape(one.title)}</title></circle>"
            for one in (line if dots else ())
        ]
    parts.append(f'<text class="soft" x="{_LEFT}%" y="{_PLOT + 18}">{escape(under[0])}</text>')
    parts.append(f'<text class="soft" x="100%" y="{_PLOT + 18}" text-anchor="end">{escape(under[1])}</text>')
    return svg(_PLOT + 26, label, parts)


def _across(x: float) -> str:
    return f"{_LEFT + x * (_RIGHT - _LEFT):.2f}%"


def _down(y: float) -> int:
    return round(20 + (1.0 - y) * (_PLOT - 32))
