"""What `compare` measured: ways to train on the same work, one row each, as a record and as a table.

Bytes are integers, times seconds. What was not measured is None.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from ondevice_trgl.report.table import Cell, Line, Span, format_seconds, make_table, table_lines, wrapped
from ondevice_trgl.units import format_size

SCHEMA_VERSION = 1
_FIGURES = (
    *("peak_bytes", "floor_bytes", "above_floor_bytes", "seconds_per_epoch"),
    *("training_seconds_per_epoch", "caching_seconds_per_epoch", "predicted_peak_bytes", "modules"),
)
_WIDE = 100
"""Columns of a terminal that has room for everything."""
_WORDS = {"did_not_fit": "did not fit", "refused": "was refused", "failed": "failed"}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One process that trained. Its figures are None unless the status is "measured"."""

    status: str
    """measured | did_not_fit (memory ran out) | refused (no plan fits the budget) | failed"""
    reason: str = ""
    batch_size: int | None = None
    micro_batch_size: int | None = None
    """Samples in memory at once; of TRGL the most that any module takes."""
    peak_bytes: int | None = None
    """Of the whole process, its start included; of TRGL also staging and planning."""
    floor_bytes: int | None = None
    """What the process held before the first step: end-to-end the whole network, TRGL none of its modules."""
    seconds_per_epoch: float | None = None
    training_seconds_per_epoch: float | None = None
    caching_seconds_per_epoch: float | None = None
    """Of TRGL; end-to-end caches nothing."""
    predicted_peak_bytes: int | None = None
    """Of TRGL, as planned."""
    modules: int | None = None
    smallest_feasible_budget_bytes: int | None = None
    """Where the budget was refused."""
    environment: Mapping[str, Any] | None = None

    @property
    def above_floor_bytes(self) -> int | None:
        """What training itself took: the peak less the floor."""
        if self.peak_bytes is None or self.floor_bytes is None:
            return None
        return self.peak_bytes - self.floor_bytes


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train, measured as often as was asked; no more once it could not be measured."""

    name: str
    """plain | e2e | e2e_accumulate | e2e_checkpoint | trgl BUDGET"""
    label: str
    budget_bytes: int | None = None
    note: str = ""
    runs: tuple[Measurement, ...] = ()

    @property
    def last(self) -> Measurement | None:
        """The latest measurement; where the row could not be measured, the one that says why."""
        return self.runs[-1] if self.runs else None

    @property
    def is_measured(self) -> bool:
        """Whether every attempt was measured."""
        return bool(self.runs) and all(run.status == "measured" for run in self.runs)

    @property
    def is_over(self) -> bool:
        """Whether a peak went over the budget."""
        return self.budget_bytes is not None and any((run.peak_bytes or 0) > self.budget_bytes for run in self.runs)

    def figure(self, name: str) -> Any:
        """The median of that figure; None unless all runs were measured and have it. Bytes stay whole."""
        values = [getattr(run, name) for run in self.runs]
        if not self.is_measured or None in values:
            return None
        middle = median(values)
        return middle if name.endswith("seconds_per_epoch") else round(middle)

    def to_dict(self) -> dict[str, Any]:
        """The row with its medians, and every single measurement in `runs`."""
        last = self.last
        return {
            "name": self.name,
            "label": self.label,
            "status": last.status if last else "failed",
            "reason": last.reason if last else "not tried",
            "note": self.note,
            "budget_bytes": self.budget_bytes,
            "batch_size": last.batch_size if last else None,
            "micro_batch_size": last.micro_batch_size if last else None,
            **{name: self.figure(name) for name in _FIGURES},
            "smallest_feasible_budget_bytes": last.smallest_feasible_budget_bytes if last else None,
            "runs": [_run_record(run) for run in self.runs],
        }


def _run_record(run: Measurement) -> dict[str, Any]:
    record = dataclasses.asdict(run) | {"above_floor_bytes": run.above_floor_bytes}
    del record["environment"]  # the same for all: it stands in the comparison
    return record


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All rows, in the order in which they were measured again and again."""

    rows: tuple[Row, ...]
    repeat: int
    workload: Mapping[str, Any]
    config: Mapping[str, Any]
    command: str = ""

    @property
    def environment(self) -> Mapping[str, Any]:
        """Of the first process that told; empty where none did."""
        return next((run.environment for row in self.rows for run in row.runs if run.environment), {})

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `compare --json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "status": "completed",
            "command": self.command,
            "repeat": self.repeat,
            "workload": dict(self.workload),
            "config": dict(self.config),
            "environment": dict(self.environment),
            "rows": [row.to_dict() for row in self.rows],
        }


def comparison_lines(comparison: Comparison, width: int = 100) -> list[Line]:
    """The table for a terminal of `width` columns, and under it what the rows have to say."""
    plain = comparison.rows[0].figure("peak_bytes") if comparison.rows else None
    names = ("<training", "batch", "peak", "above floor", "of plain", "predicted", "modules", "an epoch", "caching")
    median_of = f", medians of {comparison.repeat}" if comparison.repeat > 1 else ""
    work = f"{comparison.workload.get('model', 'model')} on {comparison.workload.get('data', 'data')}"
    rows = [_table_row(row, plain) for row in comparison.rows]
    if width < _WIDE:
        rows = [[None if name in ("modules", "caching") else cell for name, cell in zip(names, row, strict=True)]
                for row in rows]  # fmt: skip
    table = make_table(f"{work}{median_of}", names, rows)
    return [*table_lines(table, width), *(line for note in _notes(comparison) for line in wrapped(note, width))]


def _table_row(row: Row, plain: int | None) -> list[Cell]:
    peak, last = row.figure("peak_bytes"), row.last
    modules = row.figure("modules")
    absent = {"did_not_fit": Span("did not fit", "bad"), "refused": Span("refused", "bad")}
    return [
        row.label,
        f"{last.batch_size} ({last.micro_batch_size})" if last and last.batch_size else None,
        absent.get(last.status if last else "", Span("failed", "bad"))
        if peak is None
        else Span(format_size(peak), "bad" if row.is_over else ""),
        _size(row.figure("above_floor_bytes")),
        f"{peak / plain:.2f}" if peak is not None and plain else None,
        _size(row.figure("predicted_peak_bytes")),
        None if modules is None else str(modules),
        format_seconds(row.figure("seconds_per_epoch")),
        format_seconds(row.figure("caching_seconds_per_epoch")),
    ]


def _size(size: int | None) -> str | None:
    return None if size is None else format_size(size)


def _notes(comparison: Comparison) -> list[Span]:
    notes = []
    for row in comparison.rows:
        if row.note:
            notes.append(Span(f"{row.label}: {row.note}", "dim"))
        if row.last is not None and row.last.status in _WORDS:
            notes.append(Span(f"{row.label} {_WORDS[row.last.status]}: {row.last.reason}", "dim"))
        if row.is_over:
            notes.append(Span(f"{row.label} went over its budget", "bad"))
    return notes
