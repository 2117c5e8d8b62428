"""Picture files as datasets: in folders, one a class, in tables, or named one by one. What counts: listing.py."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ondevice_trgl.data.decode import Fit
from ondevice_trgl.data.entries import shown
from ondevice_trgl.data.listing import Labelled, Pictures, files_in, held_out_in, pictures_in, said_of
from ondevice_trgl.data.pictures import fit_for
from ondevice_trgl.data.prepared import find, key_of
from ondevice_trgl.data.preprocessing import CENTER_CROP
from ondevice_trgl.data.records import FileRecords, open_scratch, stream_file
from ondevice_trgl.data.source import Part, Source
from ondevice_trgl.device.start import plain_environment
from ondevice_trgl.processes import ask


@dataclass(frozen=True)
class Found:
    """Pictures to judge a trained network by, or to ask it about. Memory: the paths; `part` decodes as it is read."""

    origin: str
    class_names: tuple[str, ...]
    """Of the class folders, in the order of the labels; empty where there are none."""
    files: tuple[Path, ...]
    """In the order of the records of `part`."""
    part: Part


def image_folder(
    path: Path, image_size: int | None, orientation: str = "exif", *, scratch_dir: Path | None = None
) -> Source:
    """Class folders under `path`, or under its train folder and, where they are there, those of val and test.

    Images become RGB (alpha is dropped, of animations the first picture counts, grey levels of 16 bits are scaled),
    upright as their EXIF orientation says (unless `orientation` is stored), cropped in the middle to a square and
    scaled to `image_size` (default DEFAULT_SIZE). Another process does that when the first is asked for, and keeps the
    outcome in the user's cache folder; where that cannot be, in a file without a name in `scratch_dir`. Raises
    DataError where there is no folder, no class folder or no image of a class; a file that is no image is an error when
    its turn comes, one with another suffix is left out and counted.
    """
    return picture_source(pictures_in(path), image_size, orientation, scratch_dir=scratch_dir)


def picture_source(
    pictures: Pictures, image_size: int | None, orientation: str = "exif", *, scratch_dir: Path | None = None
) -> Source:
    """Pictures that were listed, as a dataset; see `image_folder`."""
    fit, splits = fit_for(image_size, orientation), pictures.splits
    size = fit.height
    stored = ", as stored" if orientation == "stored" else ""
    return Source(
        origin=f"{pictures.origin} cropped to squares of {size}x{size}{stored}"
        f"{f', {pictures.told}' if pictures.told else ''}",
        shape=(fit.channels, size, size),
        class_names=pictures.class_names,
        resize=CENTER_CROP,
        orientation=orientation,
        task=pictures.task,
        train=_part(splits["train"], fit, scratch_dir),
        val=(lambda: _part(splits["val"], fit, scratch_dir)) if "val" in splits else None,
        test=(lambda: _part(splits["test"], fit, scratch_dir)) if "test" in splits else None,
    )


def holdout_folder(path: Path, fit: Fit, *, scratch_dir: Path | None = None) -> Found:
    """All pictures under the class folders of `path`, one class or more; classes are those that are there.

    Where `path` has folders of splits, those of test count, else those of val; `origin` says so. Raises DataError as
    `image_folder` does, but for a class without a picture.
    """
    return found_in(held_out_in(path), fit, scratch_dir=scratch_dir)


def found_in(pictures: Pictures, fit: Fit, *, scratch_dir: Path | None = None) -> Found:
    """Pictures that were listed to judge a network by; see `pictures_named`."""
    files = pictures.splits["test"]
    return Found(
        f"{pictures.origin}{f', {pictures.told}' if pictures.told else ''}",
        pictures.class_names,
        tuple(path for path, _ in files),
        _part(files, fit, scratch_dir),
    )


def picture_files(paths: Sequence[Path], fit: Fit, *, scratch_dir: Path | None = None) -> Found:
    """The files named, whatever their suffix, and of folders every picture at any depth, in that order; labels are 0.

    Raises DataError for a path that does not exist, and for a folder without pictures.
    """
    listing = files_in(paths)
    told = said_of(listing, ())
    named = ", ".join(shown(path) for path in paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    return Found(
        f"images of {named}{f', {told}' if told else ''}",
        (),
        tuple(path for path, _ in listing.files),
        _part(listing.files, fit, scratch_dir),
    )


def _part(files: Labelled, fit: Fit, scratch_dir: Path | None = None) -> Part:
    paths = [path for path, _ in files]

    def stream() -> Iterator[Tensor]:
        with _prepared(paths, fit, scratch_dir) as file:
            yield from stream_file(file, len(paths), fit.record_bytes, what="the prepared file of the pictures")

    numbers = bool(files) and isinstance(files[0][1], tuple)
    return Part(
        torch.tensor([label for _, label in files], dtype=torch.float32 if numbers else torch.int64),
        stream,
        lambda: FileRecords(_prepared(paths, fit, scratch_dir), fit.record_bytes),
    )


def _prepared(files: Sequence[Path], fit: Fit, scratch_dir: Path | None) -> BinaryIO:
    """The records of `files`, one after another: what was prepared before, else prepared now by another process.

    Raises DataError for what is no picture, StorageError.
    """
    key, count = key_of(files, fit), len(files)
    request: dict[str, Any] = {"fit": vars(fit), "files": [str(path) for path in files]}
    environment = {**plain_environment(os.environ), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    file = find(key, count, fit.record_bytes)
    if file is None and ask("prepare", request, environment=environment)["stored"]:
        file = find(key, count, fit.record_bytes)
    if file is None:  # the cache folder cannot be written, or has no room
        file = open_scratch(scratch_dir)
        try:
            request["output"] = file.fileno()
            ask("prepare", request, environment=environment, files=[file.fileno()])
            file.seek(0)
        except BaseException:
            file.close()
            raise
    return file
