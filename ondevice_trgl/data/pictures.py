"""Datasets that are picture files, by name: `folder:PATH`. Listed here, decoded elsewhere; imports no torch."""

from pathlib import Path

from ondevice_trgl.data.decode import Fit
from ondevice_trgl.data.listing import (
    Pictures,
    check_folder,
    class_folders,
    held_out_folder,
    listed,
    pictures_in,
)
from ondevice_trgl.errors import DataError

KINDS = ("folder",)
DEFAULT_SIZE = 64
"""Side of the square that pictures become where nobody says otherwise."""


def fit_for(image_size: int | None, orientation: str) -> Fit:
    """What the pictures of a training become: RGB, in squares."""
    size = DEFAULT_SIZE if image_size is None else image_size
    return Fit(3, size, size, orientation)


def is_pictures(name: str) -> bool:
    """Whether the dataset `name` is one of picture files."""
    return name.partition(":")[0] in KINDS and ":" in name


def files_held_out(name: str) -> list[Path]:
    """The files of `name` that a trained network is judged by, in order; see `holdout_folder`. Raises DataError."""
    folder = Path(name.partition(":")[2]).expanduser()
    check_folder(folder)
    held_out = held_out_folder(folder)
    return [path for path, _ in listed(held_out, class_folders(held_out), all_needed=False).files]


def pictures_named(name: str) -> Pictures:
    """The files of the dataset `name`, with their labels. Raises DataError; see `pictures_in`."""
    rest = name.partition(":")[2]
    if not rest:
        raise DataError(f"{name!r} names no folder; expected folder:PATH", hint="for example folder:pictures/birds")
    return pictures_in(Path(rest).expanduser())
