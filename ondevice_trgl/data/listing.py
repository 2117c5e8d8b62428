"""Which files of a folder are pictures, of which class and of which split: as people mean it, and told what is not.

Imports no torch: the process that prepares pictures lists them too.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ondevice_trgl.data.entries import SUFFIXES, is_folder, is_picture, shown, visible
from ondevice_trgl.errors import DataError
from ondevice_trgl.tasks import CLASSES

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "holdout", "hold-out"),
}
"""The splits, each with the names that people give it."""
_ARCHIVES = {
    ".zip": "unzip",
    ".tar": "tar -xf",
    ".tgz": "tar -xf",
    ".gz": "tar -xf",
    ".bz2": "tar -xf",
    ".xz": "tar -xf",
    ".7z": "7z x",
    ".rar": "unrar x",
}
Label = int | tuple[float, ...]
"""The number of a class, or targets."""
Labelled = list[tuple[Path, Label]]


@dataclass
class Listing:
    """Pictures with their labels, in the order of their paths, and what was left out, by reason."""

    files: Labelled = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def told(self) -> str:
        """What was left out, for people: "3 .heic files, 2 broken links"; "" where nothing was."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))


@dataclass(frozen=True)
class Pictures:
    """Picture files with labels, by split, before any of them is opened. Splits that are not there are absent."""

    origin: str
    class_names: tuple[str, ...]
    splits: dict[str, Labelled]
    told: str = ""
    """What was left out, and what may not be meant."""
    task: str = CLASSES
    """What the labels are; `class_names` are those of the targets where they are no classes."""


def pictures_in(path: Path) -> Pictures:
    """Class folders under `path`, or under its train folder and, where they are there, those of val and test.

    Raises DataError where there is no folder, no class folder or no image of a class, or where val or test has a class
    that train has not.
    """
    check_folder(path)
    folders = split_folders(path)
    top = folders["train"]
    classes = class_folders(top)
    train = listed(top, classes, all_needed=True)
    splits, left_out = {"train": train.files}, train.left_out
    for name in ("val", "test"):
        if name in folders:
            _check_known(folders[name], top, classes)
            found = listed(folders[name], classes, all_needed=False)
            splits[name] = found.files
            left_out += found.left_out
    where = ", ".join(f"{name} in {shown(folder.name)}" for name, folder in folders.items()) if top != path else ""
    return Pictures(
        f"images under {shown(path)}{f' ({where})' if where else ''}",
        tuple(shown(name) for name in classes),
        splits,
        said_of(Listing(left_out=left_out), classes),
    )


def held_out_in(path: Path) -> Pictures:
    """The class folders that a trained network is judged by, one or more, as the one split `test`.

    Where `path` has folders of splits, those of test, else of val. Raises DataError as `pictures_in` does, but for a
    class without a picture.
    """
    check_folder(path)
    folder = held_out_folder(path)
    classes = class_folders(folder)
    listing = listed(folder, classes, all_needed=False)
    names = tuple(shown(name) for name in classes)
    return Pictures(f"images under {shown(folder)}", names, {"test": listing.files}, said_of(listing, classes))


def said_of(listing: Listing, classes: Sequence[str]) -> str:
    """What was left out, and which classes may be one, for people; "" where there is nothing to say."""
    told = [f"left out: {listing.told()}"] if listing.left_out else []
    return ", ".join([*told, *_alike(classes)])


def check_folder(path: Path) -> None:
    """Raises DataError where `path` is no folder."""
    if os.path.isdir(path):  # noqa: PTH112 -- False too for a name that no system takes
        return
    name = shown(path)
    if not os.path.exists(path):  # noqa: PTH110
        raise DataError(
            f"folder:{name}: no such folder", hint="give the folder that holds one sub-folder for each class"
        )
    suffix = path.suffix.lower()
    hint = "give the folder that holds one sub-folder for each class"
    if suffix in _ARCHIVES:
        hint = f"unpack it: `{_ARCHIVES[suffix]} {name}`, then give the folder that comes out of it"
    elif suffix in (".csv", ".tsv"):
        hint = f"a table of pictures is given as csv:{name}"
    raise DataError(f"folder:{name}: a file, and no folder", hint=hint)


def split_folders(path: Path) -> dict[str, Path]:
    """The folders of train, val and test under `path`; `path` itself as train where they are not its layout.

    Their usual other names count, in any case. A folder called train beside others that are no splits is a class.
    Raises DataError for two folders of one split.
    """
    folders, found = _split_named(path)
    alone = len(folders) == 1 and any(is_folder(entry) for entry in visible(folders[0].path))
    return found if "train" in found and (len(found) > 1 or alone) else {"train": path}


def held_out_folder(path: Path) -> Path:
    """The folder of class folders that a trained network is judged by: that of test under `path`, else of val.

    Else `path` itself. Raises DataError for two folders of one split.
    """
    folders, found = _split_named(path)
    alone = (
        len(folders) == len(found) and any(is_folder(entry) for entry in visible(folders[0].path)) if found else False
    )
    if not alone and ("train" not in found or len(found) < 2):
        return path
    return next((found[name] for name in ("test", "val", "train") if name in found), path)


def _split_named(path: Path) -> tuple[list["os.DirEntry[str]"], dict[str, Path]]:
    """The folders in `path`, and those among them that are called like a split."""
    folders = [entry for entry in visible(path) if is_folder(entry)]
    found: dict[str, Path] = {}
    for split, names in SPLITS.items():
        own = [folder for folder in folders if folder.name.lower() in names]
        if len(own) > 1:
            raise DataError(
                f"{shown(path)} has {' and '.join(shown(folder.name) for folder in own)}, which both are {split}",
                hint="keep one of them, or join their class folders",
            )
        if own:
            found[split] = path / own[0].name
    return folders, found


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the class folders, as the system has them, in the order of their labels: see `ordered`.

    Raises DataError where there are none, or one that holds the class folders itself.
    """
    entries = visible(folder)
    names = [entry.name for entry in entries if is_folder(entry)]
    pictures = sum(is_picture(entry) for entry in entries)
    if not names:
        said = f"{pictures} pictures, but" if pictures else ""
        raise DataError(
            f"{shown(folder)} has {said + ' ' if said else ''}no class folders",
            hint="put the images of each class into a sub-folder named after it",
        )
    if len(names) == 1 and not pictures:
        inner = visible(folder / names[0])
        deeper = [entry.name for entry in inner if is_folder(entry)]
        if len(deeper) > 1 and not any(is_picture(entry) for entry in inner):
            raise DataError(
                f"{shown(folder)} has one folder, {shown(names[0])}, and the class folders are in that",
                hint=f"write folder:{shown(folder / names[0])}",
            )
    return ordered(names)


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Classes in the order of their labels: numbers by value where all are, else by letters."""
    known = list(names)
    numbered = all(name.isascii() and name.isdigit() for name in known)
    return tuple(sorted(known, key=(lambda name: (int(name), name)) if numbered else None))


def listed(folder: Path, classes: Iterable[str], *, all_needed: bool) -> Listing:
    """The pictures of the class folders, at any depth. Folders that are linked are followed, each once.

    Raises DataError where there is no picture or, with `all_needed`, where a class has none.
    """
    listing, empty = Listing(), []
    for label, name in enumerate(classes):
        before = len(listing.files)
        if (folder / name).is_dir():
            _walk(folder / name, label, listing, set())
        if len(listing.files) == before:
            empty.append(shown(name))
    left = f"; left out: {listing.told()}" if listing.left_out else ""
    if not listing.files:
        raise DataError(
            f"{shown(folder)} has class folders but no images{left}", hint=f"images end in {' '.join(SUFFIXES)}"
        )
    if empty and all_needed:
        raise DataError(
            f"{shown(folder)} has no image of {', '.join(empty)}{left}",
            hint=f"take the empty class folders away, or fill them; images end in {' '.join(SUFFIXES)}",
        )
    return listing


def files_in(paths: Iterable[Path]) -> Listing:
    """The files that are named, whatever they are called, and the pictures of folders, at any depth; all labelled 0.

    Raises DataError for a path that is neither (a pipe would be waited for, and gives its picture once), and where
    there is no picture.
    """
    listing = Listing()
    for path in paths:
        before = len(listing.files)
        if os.path.isdir(path):  # noqa: PTH112 -- False too for a name that no system takes
            _walk(path, 0, listing, set())
            if len(listing.files) == before:
                left = f"; left out: {listing.told()}" if listing.left_out else ""
                raise DataError(f"{shown(path)} has no images{left}", hint=f"images end in {' '.join(SUFFIXES)}")
        elif os.path.isfile(path):  # noqa: PTH113
            listing.files.append((path, 0))
        elif os.path.exists(path):  # noqa: PTH110
            raise DataError(
                f"{shown(path)} is neither a file nor a folder, but a pipe or a device",
                hint="write the picture to a file first",
            )
        else:
            raise DataError(f"{shown(path)}: no such file or folder", hint="give picture files, or folders of them")
    if not listing.files:
        raise DataError("no picture was named", hint="give picture files, or folders of them")
    return listing


def _check_known(folder: Path, top: Path, classes: Sequence[str]) -> None:
    """Raises DataError where `folder` has class folders that are not among `classes`, those of `top`."""
    unknown = sorted(set(class_folders(folder)) - set(classes))
    if unknown:
        normal = {_normal(name) for name in classes}
        alike = [shown(name) for name in unknown if _normal(name) in normal]
        form = f"; {', '.join(alike)}: written in another Unicode form there, give both one name" if alike else ""
        raise DataError(
            f"{shown(folder)} has class folders that {shown(top)} has not: {', '.join(map(shown, unknown))}",
            hint=f"the classes of {shown(top.name)} are {', '.join(map(shown, classes))}{form}",
        )


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _alike(classes: Sequence[str]) -> list[str]:
    """Classes whose names look the same, in words: macOS writes an accent as a character of its own."""
    counts = Counter(map(_normal, classes))
    return [
        f"{count} classes are called {shown(name)}, in different Unicode forms"
        for name, count in sorted(counts.items())
        if count > 1
    ]


def _walk(folder: Path, label: int, listing: Listing, seen: set[tuple[int, int]]) -> None:
    try:
        status = folder.stat()
        entries = visible(folder)
    except OSError:
        listing.left_out["folders that cannot be read"] += 1
        return
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in entries:
        if is_folder(entry):
            _walk(Path(entry.path), label, listing, seen)
        elif is_picture(entry):
            listing.files.append((Path(entry.path), label))
        elif entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110 -- no object for a mere question
            listing.left_out["broken links"] += 1
        else:
            listing.left_out[f"{Path(entry.name).suffix.lower() or 'other'} files"] += 1
