"""Which files of a folder are pictures, of which class and of which split: as people mean it, and told what is not."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ondevice_trgl.errors import DataError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "holdout", "hold-out"),
}
_NEVER = ("__macosx", "@eadir", "thumbs.db", "desktop.ini")
"""What systems leave beside pictures; names that begin with a dot are theirs too."""


@dataclass
class Listing:
    """Pictures with their labels, in the order of their paths, and what was left out, by reason."""

    files: list[tuple[Path, int]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def told(self) -> str:
        """What was left out, for people: "3 .heic files, 2 broken links"; "" where nothing was."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))


def split_folders(path: Path) -> dict[str, Path]:
    """The folders of train, val and test under `path`; `path` itself as train where they are not its layout.

    Their usual other names count, in any case. A folder called train beside others that are no splits is a class.
    Raises DataError for two folders of one split.
    """
    folders = [entry for entry in _visible(path) if entry.is_dir()]
    found: dict[str, Path] = {}
    for split, names in _SPLITS.items():
        own = [folder for folder in folders if folder.name.lower() in names]
        if len(own) > 1:
            raise DataError(
                f"{path} has {' and '.join(folder.name for folder in own)}, which both are {split}",
                hint="keep one of them, or join their class folders",
            )
        if own:
            found[split] = own[0]
    alone = len(folders) == 1 and any(entry.is_dir() for entry in _visible(folders[0]))
    return found if "train" in found and (len(found) > 1 or alone) else {"train": path}


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the class folders, in the order of their labels: numbers by value where all are, else by letters.

    Raises DataError where there are none.
    """
    names = [entry.name for entry in _visible(folder) if entry.is_dir()]
    if not names:
        raise DataError(
            f"{folder} has no class folders", hint="put the images of each class into a sub-folder named after it"
        )
    numbered = all(name.isascii() and name.isdigit() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if numbered else None))


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
            empty.append(name)
    if not listing.files:
        raise DataError(
            f"{folder} has class folders but no images{f'; left out: {listing.told()}' if listing.left_out else ''}",
            hint=f"images end in {' '.join(SUFFIXES)}",
        )
    if empty and all_needed:
        raise DataError(
            f"{folder} has no image of {', '.join(empty)}{f'; left out: {listing.told()}' if listing.left_out else ''}",
            hint=f"take the empty class folders away, or fill them; images end in {' '.join(SUFFIXES)}",
        )
    return listing


def _walk(folder: Path, label: int, listing: Listing, seen: set[tuple[int, int]]) -> None:
    try:
        status = folder.stat()
        entries = list(_visible(folder))
    except OSError:
        listing.left_out["folders that cannot be read"] += 1
        return
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    for entry in entries:
        if entry.is_dir():
            _walk(entry, label, listing, seen)
        elif not entry.exists():
            listing.left_out["broken links"] += 1
        elif entry.suffix.lower() in SUFFIXES and entry.is_file():
            listing.files.append((entry, label))
        else:
            listing.left_out[f"{entry.suffix.lower() or 'other'} files"] += 1


def _visible(folder: Path) -> Iterator[Path]:
    """What is in `folder`, sorted, but what systems leave there."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    yield from (folder / name for name in names if name[0] != "." and name.lower() not in _NEVER)
