"""What a run holds on disk and can do without, removed: its boundary cache, what killed processes left, or all."""

import contextlib
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from ondevice_trgl.errors import RunDirError, StorageError
from ondevice_trgl.run.inventory import Run, weighed
from ondevice_trgl.run.links import check_folder
from ondevice_trgl.run.lock import held, is_held
from ondevice_trgl.run.run_dir import RECORD, SCRATCH, RunDir, check_links

COMMITTED = "committed"
"""In modules/: what is pending there is to be kept, see `model.store`."""
_CACHED = ("boundary-*", "mending", "optimizer-*", "*.tmp")
"""What we write into the folder of a cache."""


def clean(run: Run, *, everything: bool = False) -> int:
    """Remove the boundary cache of `run` and what killed processes left in it; with `everything`, all its files.

    Returns the bytes freed. The run can be resumed, as long as not everything is gone: boundaries are made again. Files
    that are not of a run stay. Raises RunDirError, before anything is removed, where a living process works on the run,
    it is of a newer version, or has links in it; StorageError.
    """
    check_links(run.path)
    for folder in run.caches:
        check_folder(folder)
    if run.is_newer:
        raise RunDirError(f"{run.path} was made by a newer version", hint="upgrade, or remove the folder yourself")
    with contextlib.ExitStack() as locks:
        locks.enter_context(held(run.path))
        locks.enter_context(held(run.path / RECORD))  # who evaluates it shares this
        freed = sum(_remove(path) for path in _spare(run))
        for folder in run.caches:
            if not folder.is_symlink():
                _drop_empty(folder)
        if everything:
            freed += sum(_remove(path) for path in RunDir(run.path).files())
            _drop_empty(run.path)
        return freed


def clean_scratch(folder: Path, *, older_than: float = 0.0) -> int:
    """Remove temporary folders in `folder` whose process is gone; returns the bytes freed. Raises StorageError.

    Those alone that nothing was added to for `older_than` seconds: a process makes one, and then takes its lock.
    """
    last = time.time() - older_than
    return sum(_remove(path) for path in _abandoned(folder) if path.stat().st_mtime <= last)


def _spare(run: Run) -> Iterator[Path]:
    for folder in run.caches:
        for pattern in _CACHED:
            yield from sorted(folder.glob(pattern))
        yield from _abandoned(folder.parent)
    modules = RunDir(run.path).modules
    yield from _torn(run.path.iterdir())
    yield from _torn(modules.glob("*"))
    if not (modules / COMMITTED).is_file():
        yield from sorted(modules.glob("*.pending"))


def _torn(entries: Iterable[Path]) -> list[Path]:
    """Files that were being written: each would have been moved to its place, without the dot and the suffix."""
    return sorted(path for path in entries if path.name.startswith(".") and path.name.endswith(".tmp"))


def _abandoned(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{SCRATCH}*") if path.is_dir() and not is_held(path))


def _remove(path: Path) -> int:
    size = sum(size for size, _ in weighed(path))
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot remove {error.filename or path}: {error.strerror}", hint="see who owns it"
        ) from error
    return size


def _drop_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
