"""Pictures listed in a CSV file: paths, classes or targets and, if need be, splits, a column each. No torch."""

import csv
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

from ondevice_trgl.data.entries import shown
from ondevice_trgl.data.listing import SPLITS, Labelled, Pictures, ordered
from ondevice_trgl.errors import DataError
from ondevice_trgl.tasks import AUTO, CLASSES, MULTI_LABEL

_PATHS = ("path", "file", "filename", "image", "image_path")
_LABELS = ("label", "class", "category", "target")
_SPLIT = ("split", "set", "subset")
_DELIMITERS = ",;\t"
_MOST_LINE = 1 << 20
_TARGET = "target"
"""What the columns of numbers begin with, where there are several."""
_HINT = f"the first line names the columns: {'|'.join(_PATHS)} and {'|'.join(_LABELS)}; {'|'.join(_SPLIT)} if need be"


@dataclass(frozen=True)
class _Row:
    line: int
    path: Path
    label: str | tuple[float, ...]
    split: str


@dataclass(frozen=True)
class _Columns:
    path: int
    labels: tuple[int, ...]
    split: int | None
    names: tuple[str, ...]
    """Of the targets."""
    task: str


def pictures_listed(path: Path, task: str = AUTO) -> Pictures:
    """The pictures that the CSV file `path` lists, with the classes of those that are trained on.

    With regression or multi-label as `task`, with numbers: of the columns target, target_width and so on, or else of
    that of labels. Columns go by their usual names, in any case; others are ignored. Paths count from the folder of the
    file. Without a column of splits all are for training. Fields are parted by comma, semicolon or tab; text is UTF-8.
    Raises DataError, with the line, for a missing column, an empty field, a file that is not there, and a picture with
    two labels or in two splits.
    """
    rows, repeated, columns = _rows(path, task)
    if not any(row.split == "train" for row in rows):
        raise DataError(f"{shown(path)} has no row to train on", hint=f"the split is one of {', '.join(SPLITS)}")
    classes = columns.names or ordered({str(row.label) for row in rows if row.split == "train"})
    for row in rows:
        if isinstance(row.label, str) and row.label not in classes:
            _fail(path, row.line, f"class {shown(row.label)} is not in any row of train")
    splits = {split: _labelled(rows, split, classes) for split in SPLITS}
    splits = {split: files for split, files in splits.items() if files}
    return _pictures(path, columns.task, classes, splits, repeated)


def held_out_listed(path: Path, task: str = AUTO) -> Pictures:
    """The rows that a trained network is judged by, as the one split `test`: those of test, else of val, else all.

    Raises DataError as `pictures_listed` does, but for classes.
    """
    rows, repeated, columns = _rows(path, task)
    split = next((name for name in ("test", "val", "train") if any(row.split == name for row in rows)), "train")
    classes = columns.names or ordered({str(row.label) for row in rows if row.split == split})
    return _pictures(path, columns.task, classes, {"test": _labelled(rows, split, classes)}, repeated, split)


def _pictures(
    path: Path, task: str, classes: tuple[str, ...], splits: dict[str, Labelled], repeated: int, only: str = ""
) -> Pictures:
    where = only if only not in ("", "train") else ", ".join(splits) if len(splits) > 1 else ""
    return Pictures(
        f"images listed in {shown(path)}{f' ({where})' if where else ''}",
        tuple(map(shown, classes)),
        splits,
        f"left out: {repeated} repeated rows" if repeated else "",
        task,
    )


def _labelled(rows: list[_Row], split: str, classes: tuple[str, ...]) -> Labelled:
    labels = {name: label for label, name in enumerate(classes)}
    return [
        (row.path, labels[row.label] if isinstance(row.label, str) else row.label) for row in rows if row.split == split
    ]


def _rows(path: Path, task: str) -> tuple[list[_Row], int, _Columns]:
    """The rows, each picture once, how many were there again, and where their labels stand. Raises DataError."""
    seen: dict[Path, _Row] = {}
    repeated = 0
    rows = _read(path, task)
    columns = next(rows)
    assert isinstance(columns, _Columns)
    for row in rows:
        assert isinstance(row, _Row)
        before = seen.setdefault(row.path, row)
        if before is row:
            continue
        for what, mine, other in (("label", row.label, before.label), ("split", row.split, before.split)):
            if mine != other:
                _fail(
                    path,
                    row.line,
                    f"{shown(row.path)} has the {what} {_said(mine)}, in line {before.line} {_said(other)}",
                )
        repeated += 1
    if not seen:
        raise DataError(f"{shown(path)} lists no pictures", hint=_HINT)
    return list(seen.values()), repeated, columns


def _said(label: str | tuple[float, ...]) -> str:
    return shown(label) if isinstance(label, str) else ", ".join(f"{value:g}" for value in label)


def _read(path: Path, task: str) -> Iterator[_Columns | _Row]:
    """Where what stands, and then the rows."""
    if os.path.isdir(path):  # noqa: PTH112 -- these are False too for a name that no system takes
        hint = f"a folder of class folders is given as folder:{shown(path)}"
        raise DataError(f"csv:{shown(path)}: a folder", hint=hint)
    if not os.path.isfile(path):  # noqa: PTH113
        if os.path.exists(path):  # noqa: PTH110
            hint = "write the table to a file first: it is read more than once"
            raise DataError(f"csv:{shown(path)}: a pipe or a device, and no file", hint=hint)
        raise DataError(f"csv:{shown(path)}: no such file", hint="check the path")
    line = 1
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = _lines(file)
            header = next(lines, "")
            delimiter = max(_DELIMITERS, key=header.count)
            columns = _columns(path, [n.strip() for n in next(csv.reader([header], delimiter=delimiter), [])], task)
            yield columns
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            for fields in reader:
                line = reader.line_num + 1
                if any(field.strip() for field in fields):
                    yield _row(path, line, [field.strip() for field in fields], columns)
    except csv.Error as error:
        _fail(path, line + 1, str(error))
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {error.strerror}", hint="check the path") from error


def _lines(file: TextIO) -> Iterator[str]:
    """The lines of `file`, none longer than is meant. Raises csv.Error."""
    while text := file.readline(_MOST_LINE + 1):
        if len(text) > _MOST_LINE:
            raise csv.Error(f"a line has more than {_MOST_LINE} characters")
        yield text


def _columns(path: Path, given: list[str], task: str) -> _Columns:
    """Where the columns of path, labels and split are; the last may be missing."""
    names = [name.lower() for name in given]
    found = [next((names.index(name) for name in known if name in names), None) for known in (_PATHS, _LABELS, _SPLIT)]
    targets = tuple(k for k, name in enumerate(names) if name.startswith(_TARGET) and k != found[0])
    if task in (AUTO, CLASSES) and found[1] is None and targets:
        raise DataError(
            f"{shown(path)} has columns of targets: {', '.join(shown(given[k]) for k in targets[:10])}",
            hint="state what they are: task = 'regression' or 'multi-label' (--task); a class stands in a column label",
        )
    if task not in (AUTO, CLASSES) and targets:
        found[1] = targets[0]
    for place, known in zip(found[:2], (_PATHS, _LABELS), strict=True):
        if place is None:
            have = ", ".join(shown(name) or '""' for name in names[:10]) or "an empty line"
            raise DataError(f"{shown(path)} has no column {' or '.join(known)} in line 1: {have}", hint=_HINT)
    at, label_at, split_at = found
    assert at is not None and label_at is not None
    if task in (AUTO, CLASSES):
        return _Columns(at, (label_at,), split_at, (), CLASSES)
    chosen = targets or (label_at,)
    return _Columns(at, chosen, split_at, tuple(shown(given[k]) for k in chosen), task)


def _row(path: Path, line: int, cells: list[str], columns: _Columns) -> _Row:
    """One row, checked. Raises DataError."""
    at, split_at = columns.path, columns.split
    name = cells[at] if at < len(cells) else ""
    split = cells[split_at] if split_at is not None and split_at < len(cells) else ""
    if not name:
        _fail(path, line, "it names no picture")
    given = [cells[k] if k < len(cells) else "" for k in columns.labels]
    if "" in given:
        what = f"number in column {columns.names[given.index('')]}" if columns.names else "label"
        _fail(path, line, f"{shown(name)} has no {what}")
    label: str | tuple[float, ...] = given[0]
    if columns.names:
        label = tuple(_number(path, line, *pair, columns.task) for pair in zip(given, columns.names, strict=True))
    with_split = split_at is not None
    known = next((known for known, names in SPLITS.items() if split.lower() in names), "") if with_split else "train"
    if not known:
        said = f"{shown(split)!r} is no split" if split else f"{shown(name)} has no split"
        _fail(path, line, f"{said}; expected {', '.join(SPLITS)}")
    picture = Path(os.path.normpath(path.parent / name))
    if not os.path.isfile(picture):  # noqa: PTH113 -- False too for a name that no system takes
        _fail(path, line, f"there is no file {shown(picture)}", "paths count from the folder of the CSV file")
    return _Row(line, picture, label, known)


def _number(path: Path, line: int, text: str, column: str, task: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if task == MULTI_LABEL and value not in (0.0, 1.0):
        _fail(path, line, f"column {column} has {shown(text)}; expected 0 or 1, for task = {task!r}")
    if not math.isfinite(value):
        _fail(path, line, f"column {column} has {shown(text)}; expected a number, for task = {task!r}")
    return value


def _fail(path: Path, line: int, what: str, hint: str = "mend the line, or take it out") -> NoReturn:
    raise DataError(f"{shown(path)}, line {line}: {what}", hint=hint)
