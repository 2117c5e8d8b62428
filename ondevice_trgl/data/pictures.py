"""Datasets that are picture files, by name: `folder:PATH`, `csv:FILE`. Listed here, decoded elsewhere; no torch."""

import os
from collections.abc import Callable
from pathlib import Path

from ondevice_trgl.config import IN_FILES
from ondevice_trgl.data.decode import Fit
from ondevice_trgl.data.entries import shown
from ondevice_trgl.data.listing import Pictures, held_out_in, pictures_in
from ondevice_trgl.data.table import held_out_listed, pictures_listed
from ondevice_trgl.errors import DataError
from ondevice_trgl.tasks import AUTO, CLASSES

_Read = Callable[[Path, str], Pictures]
_READ: dict[str, tuple[str, _Read, _Read]] = {
    "folder": ("expected folder:PATH", lambda path, task: pictures_in(path), lambda path, task: held_out_in(path)),
    "csv": ("expected csv:FILE", pictures_listed, held_out_listed),
}
"""Of every kind in IN_FILES: how it is written, and who reads it to train on, and to judge by."""
DEFAULT_SIZE = 64
"""Side of the square that pictures become where nobody says otherwise."""


def fit_for(image_size: int | None, orientation: str) -> Fit:
    """What the pictures of a training become: RGB, in squares."""
    size = DEFAULT_SIZE if image_size is None else image_size
    return Fit(3, size, size, orientation)


def is_pictures(name: str) -> bool:
    """Whether the dataset `name` is one of picture files."""
    return name.partition(":")[0] in IN_FILES and ":" in name


def same_data(one: str, other: str) -> bool:
    """Whether two names are of the same data: those of picture files however their path is written."""
    if one == other or not (is_pictures(one) and is_pictures(other)):
        return one == other
    (kind, _, place), (other_kind, _, other_place) = one.partition(":"), other.partition(":")
    if not (kind == other_kind and place and other_place):
        return False
    return os.path.realpath(Path(place).expanduser()) == os.path.realpath(Path(other_place).expanduser())


def files_held_out(name: str, task: str = AUTO) -> list[Path]:
    """The files of `name` that a trained network is judged by, in order; see `pictures_named`. Raises DataError."""
    return [path for path, _ in pictures_named(name, held_out=True, task=task).splits["test"]]


def pictures_named(name: str, *, held_out: bool = False, task: str = AUTO) -> Pictures:
    """The files of the dataset `name`, with their labels; `held_out`: those to judge a trained network by, as `test`.

    Labels are classes, or what `task` says: numbers are in a CSV file alone.

    Raises DataError; see `pictures_in` and `pictures_listed`.
    """
    kind, _, rest = name.partition(":")
    expected, read, read_held_out = _READ[kind]
    if not rest:
        raise DataError(f"{name!r} names no path; {expected}", hint="for example folder:pictures/birds")
    if kind == "folder" and task not in (AUTO, CLASSES):
        raise DataError(
            f"{name} has class folders, and task = {task!r} needs numbers",
            hint="list the pictures in a table, csv:FILE",
        )
    return (read_held_out if held_out else read)(Path(rest).expanduser(), task)


def meant(name: str) -> str:
    """A hint for a name that is none of a dataset's, but a path: the way to write it; "" where there is no such."""
    path = Path(name).expanduser()
    if not name or not os.path.exists(path):  # noqa: PTH110 -- False too for a name that no system takes
        return ""
    if path.is_dir():
        return f"did you mean folder:{shown(name)}?"
    if path.suffix.lower() in (".csv", ".tsv"):
        return f"did you mean csv:{shown(name)}?"
    return f"{shown(name)} is a file: pictures are given as folder:PATH, or listed in csv:FILE"
