"""Pictures listed in a CSV file: a column of paths, one of classes and, if need be, one of splits. Imports no torch."""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ondevice_trgl.data.entries import shown
from ondevice_trgl.data.listing import SPLITS, Labelled, Pictures, ordered
from ondevice_trgl.errors import DataError

_PATHS = ("path", "file", "filename", "image", "image_path")
_LABELS = ("label", "class", "category", "target")
_SPLIT = ("split", "set", "subset")
_DELIMITERS = ",;\t"
_HINT = f"the first line names the columns: {'|'.join(_PATHS)} and {'|'.join(_LABELS)}; {'|'.join(_SPLIT)} if need be"


@dataclass(frozen=True)
class _Row:
    line: int
    path: Path
    label: str
    split: str


def pictures_listed(path: Path) -> Pictures:
    """The pictures that the CSV file `path` lists, with the classes of those that are trained on.

    Columns go by their usual names, in any case; others are ignored. Paths count from the file's folder. Without a
    column of splits all are for training. Fields are parted by comma, semicolon or tab; text is UTF-8.
    Raises DataError, with the line, for a missing column, an empty field, a file that is not there, and a picture with
    two labels or in two splits.
    """
    rows, repeated = _rows(path)
    if not any(row.split == "train" for row in rows):
        raise DataError(f"{shown(path)} has no row to train on", hint=f"the split is one of {', '.join(SPLITS)}")
    classes = ordered({row.label for row in rows if row.split == "train"})
    for row in rows:
        if row.label not in classes:
            _fail(path, row.line, f"class {shown(row.label)} is not in any row of train")
    splits = {split: _labelled(rows, split, classes) for split in SPLITS}
    splits = {split: files for split, files in splits.items() if files}
    return _pictures(path, classes, splits, repeated)


def held_out_listed(path: Path) -> Pictures:
    """The rows that a trained network is judged by, as the one split `test`: those of test, else of val, else all.

    Raises DataError as `pictures_listed` does, but for classes.
    """
    rows, repeated = _rows(path)
    split = next((name for name in ("test", "val", "train") if any(row.split == name for row in rows)), "train")
    classes = ordered({row.label for row in rows if row.split == split})
    return _pictures(path, classes, {"test": _labelled(rows, split, classes)}, repeated, split)


def _pictures(
    path: Path, classes: tuple[str, ...], splits: dict[str, Labelled], repeated: int, only: str = ""
) -> Pictures:
    where = only if only not in ("", "train") else ", ".join(splits) if len(splits) > 1 else ""
    return Pictures(
        f"images listed in {shown(path)}{f' ({where})' if where else ''}",
        tuple(map(shown, classes)),
        splits,
        f"left out: {repeated} repeated rows" if repeated else "",
    )


def _labelled(rows: list[_Row], split: str, classes: tuple[str, ...]) -> Labelled:
    labels = {name: label for label, name in enumerate(classes)}
    return [(row.path, labels[row.label]) for row in rows if row.split == split]


def _rows(path: Path) -> tuple[list[_Row], int]:
    """The rows, each picture once, and how many were there again. Raises DataError."""
    seen: dict[Path, _Row] = {}
    repeated = 0
    for row in _read(path):
        before = seen.setdefault(row.path, row)
        if before is row:
            continue
        for what, mine, other in (("label", row.label, before.label), ("split", row.split, before.split)):
            if mine != other:
                _fail(
                    path,
                    row.line,
                    f"{shown(row.path)} has the {what} {shown(mine)}, in line {before.line} {shown(other)}",
                )
        repeated += 1
    if not seen:
        raise DataError(f"{shown(path)} lists no pictures", hint=_HINT)
    return list(seen.values()), repeated


def _read(path: Path) -> Iterator[_Row]:
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
            header = file.readline()
            delimiter = max(_DELIMITERS, key=header.count)
            names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]
            at, label_at, split_at = _columns(path, names)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for fields in reader:
                line = reader.line_num + 1
                if any(field.strip() for field in fields):
                    cells = [
                        fields[k].strip() if k is not None and k < len(fields) else "" for k in (at, label_at, split_at)
                    ]
                    yield _row(path, line, *cells, with_split=split_at is not None)
    except csv.Error as error:
        _fail(path, line + 1, str(error))
    except OSError as error:
        raise DataError(f"{shown(path)} cannot be read: {error.strerror}", hint="check the path") from error


def _columns(path: Path, names: list[str]) -> tuple[int, int, int | None]:
    """Where the columns of path, label and split are; the last may be missing."""
    found = [next((names.index(name) for name in known if name in names), None) for known in (_PATHS, _LABELS, _SPLIT)]
    for place, known in zip(found[:2], (_PATHS, _LABELS), strict=True):
        if place is None:
            have = ", ".join(shown(name) or '""' for name in names[:10]) or "an empty line"
            raise DataError(f"{shown(path)} has no column {' or '.join(known)} in line 1: {have}", hint=_HINT)
    at, label_at, split_at = found
    assert at is not None and label_at is not None
    return at, label_at, split_at


def _row(path: Path, line: int, name: str, label: str, split: str, *, with_split: bool) -> _Row:
    """One row, checked. Raises DataError."""
    if not name:
        _fail(path, line, "it names no picture")
    if not label:
        _fail(path, line, f"{shown(name)} has no label")
    known = next((known for known, names in SPLITS.items() if split.lower() in names), "") if with_split else "train"
    if not known:
        said = f"{shown(split)!r} is no split" if split else f"{shown(name)} has no split"
        _fail(path, line, f"{said}; expected {', '.join(SPLITS)}")
    picture = Path(os.path.normpath(path.parent / name))
    if not os.path.isfile(picture):  # noqa: PTH113 -- False too for a name that no system takes
        _fail(path, line, f"there is no file {shown(picture)}", "paths count from the folder of the CSV file")
    return _Row(line, picture, label, known)


def _fail(path: Path, line: int, what: str, hint: str = "mend the line, or take it out") -> NoReturn:
    raise DataError(f"{shown(path)}, line {line}: {what}", hint=hint)
