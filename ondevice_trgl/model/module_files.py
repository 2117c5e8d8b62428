"""The files of a run's modules: as each was saved last, what is pending, and as it was the time before."""

from collections.abc import Collection
from pathlib import Path

from ondevice_trgl.durable import sync
from ondevice_trgl.errors import DamagedFileError, StorageError
from ondevice_trgl.model.tensorfile import keep, verify, write_tensors

_COMMITTED = "committed"
"""Stands while what is pending takes the place of what was saved before."""


class ModuleFiles:
    """In `folder`, by index: 003.safetensors, and while they are needed 003.pending and 003.before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, index: int) -> Path:
        return self.folder / f"{index:03d}.safetensors"

    def has(self, index: int) -> bool:
        return self.path(index).is_file()

    def pending(self, index: int) -> Path:
        return self.folder / f"{index:03d}.pending"

    def before(self, index: int) -> Path:
        return self.folder / f"{index:03d}.before"

    def commit(self) -> None:
        """Let everything that is pending be the modules', all of it or none. Raises StorageError."""
        write_tensors(self.folder / _COMMITTED, {})  # from here on `recover` does the rest
        self.recover()

    def recover(self) -> None:
        """Finish what was cut off; what was pending without a commit is dropped. For the one who writes.

        Raises StorageError.
        """
        try:
            self._recover()
        except OSError as error:
            raise StorageError(f"cannot put {error.filename} in its place: {error.strerror}") from error

    def _recover(self) -> None:
        is_committed = (self.folder / _COMMITTED).is_file()
        pending = self._indices(".pending")
        for index in pending:
            if is_committed:
                keep(self.path(index), self.before(index))
                self.pending(index).replace(self.path(index))
            else:
                self.pending(index).unlink()
        for index in self._indices(".before"):
            if not self.path(index).exists():  # a disk without links, cut off between two renames
                self.before(index).replace(self.path(index))
        sync(self.folder)
        if is_committed:
            self.forget(but=pending)
            (self.folder / _COMMITTED).unlink()

    def forget(self, but: Collection[int] = ()) -> None:
        """Drop what was saved the time before, of every module that is not among `but`."""
        for index in self._indices(".before"):
            if index not in but:
                self.before(index).unlink(missing_ok=True)

    def damaged(self) -> list[int]:
        """Modules of which not every byte is as it was written; all of them are read, a megabyte at a time.

        Raises DamagedFileError for a folder in the place of a file.
        """
        saved = self._indices(".safetensors")
        for path in map(self.path, saved):
            if path.is_dir():
                raise DamagedFileError(f"{path} is a folder, expected a file", hint="bring the file back")
        return [index for index in saved if not _is_whole(self.path(index))]

    def _indices(self, suffix: str) -> list[int]:
        """Of our own files with that suffix; what somebody else has put there is left alone."""
        stems = (path.stem for path in self.folder.glob(f"*{suffix}"))
        return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit() and f"{int(stem):03d}" == stem)

    def has_before(self, index: int) -> bool:
        """Whether module `index` was saved before its last time, and that file is whole."""
        return _is_whole(self.before(index))

    def take_before(self, index: int) -> None:
        """Let module `index` be as it was saved the time before. For the one who writes."""
        self.before(index).replace(self.path(index))
        sync(self.folder)

    def drop(self, index: int) -> None:
        """Let module `index` never have been saved. For the one who writes."""
        self.before(index).unlink(missing_ok=True)
        self.path(index).unlink(missing_ok=True)
        sync(self.folder)


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except DamagedFileError:
        return False
    return True
