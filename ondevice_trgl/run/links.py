"""Links, pipes and devices in a folder of a run, which would lead elsewhere: refused."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from ondevice_trgl.errors import RunDirError


def check_folder(folder: Path) -> None:
    """Raises RunDirError where `folder`, or what is in it, is a link, a pipe or a device; not where there is none."""
    refuse([folder] if os.path.islink(folder) else odd_in(folder))  # noqa: PTH114 -- False for any name


def odd_in(folder: Path, is_meant: Callable[[str], bool] = lambda name: True) -> list[Path]:
    """What is in `folder`, of the names that are meant, and neither a folder nor a regular file."""
    odd: list[Path] = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # whoever needs it says what is wrong
        for entry in entries:
            kept = entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False)
            odd += [Path(entry.path)] if not kept and is_meant(entry.name) else []
    return odd


def refuse(odd: list[Path]) -> None:
    """Raises RunDirError where there is any."""
    if odd:
        what = "a link" if odd[0].is_symlink() else "no regular file"
        raise RunDirError(
            f"{odd[0]} is {what}, and a run directory holds files and folders alone",
            hint="put what it stands for in its place, where you trust it; a cache elsewhere is named by --cache-dir",
        )
