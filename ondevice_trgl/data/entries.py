"""What lies in a folder, but for what systems leave there. Imports no torch."""

import os
import re
from pathlib import Path

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_NEVER = ("__macosx", "@eadir", "thumbs.db", "desktop.ini")
"""What systems leave beside pictures; names that begin with a dot are theirs too."""


def shown(name: str | Path) -> str:
    """A file's name as one line that can be written anywhere: control characters, bytes that are no UTF-8 escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether it is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or through what may not be read
        return False


def is_picture(entry: "os.DirEntry[str]") -> bool:
    """Whether it is a picture by its suffix, or a link to one that is there."""
    try:
        return entry.name.lower().endswith(SUFFIXES) and entry.is_file()
    except OSError:
        return False


def visible(folder: "Path | str") -> list["os.DirEntry[str]"]:
    """What is in `folder`, sorted, but what systems leave there."""
    with os.scandir(folder) as entries:
        kept = [entry for entry in entries if entry.name[0] != "." and entry.name.lower() not in _NEVER]
    return sorted(kept, key=lambda entry: entry.name)
