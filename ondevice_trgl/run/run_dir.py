"""The run directory: what a run has to remember, each file written whole or not at all, and read as somebody else's.

From staging:
config.json           what the run is (record.RunRecord)
blueprint.json        the network without its weights, where it has one
weights.safetensors   the weights that it starts with, until the run is completed
names.json            names in the network's state dict, tied ones together
costs.json            what its pieces take in memory
From planning:
plan.json             the plan
partition.json        the modules that were cut
From training:
events.jsonl          one JSON object a line: what happened when
modules/              weights and optimizer state of each module that was trained, a safetensors file each (model.store)
cache/                boundary activations, while the run needs them
model.safetensors, report.json, report.html     at the end
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ondevice_trgl.bounded import parse_object, read_bytes
from ondevice_trgl.durable import sync, write_json, write_text
from ondevice_trgl.errors import ConfigError, DamagedFileError, RunDirError, StorageError
from ondevice_trgl.run.links import check_folder, odd_in, refuse
from ondevice_trgl.run.lock import held

T = TypeVar("T")
FORMAT = 2
"""Of the directory, all files in it; stands in the record, and is looked at before any other is."""
RECORD, BLUEPRINT, WEIGHTS, NAMES, COSTS = (
    *("config.json", "blueprint.json", "weights.safetensors", "names.json"),
    "costs.json",
)
PLAN, PARTITION = "plan.json", "partition.json"
REPORT = "report.json"
SITTING = "sitting.json"
"""Stands while a process trains the run, see `sitting`."""
_OURS = (
    *(RECORD, BLUEPRINT, WEIGHTS, NAMES, COSTS, PLAN, PARTITION, "events.jsonl", "modules", "cache"),
    *("model.safetensors", REPORT, "report.html", SITTING),
)


SCRATCH = ".trgl-"
"""How the names of temporary folders begin that may stand in a run directory while the run is made."""


class RunDir:
    """One run's folder. `create` makes it, `open` finds it again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def modules(self) -> Path:
        return self.path / "modules"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def has_blueprint(self) -> bool:
        return (self.path / BLUEPRINT).is_file()

    @property
    def staged(self) -> Path:
        """The whole network's weights before training; once the run is completed, the trained ones."""
        weights = self.path / WEIGHTS
        return weights if weights.is_file() else self.model

    def files(self) -> list[Path]:
        """Files and folders of a run that are here, the record last, as without it this is no run."""
        ours = (entry for entry in self.path.iterdir() if _is_ours(entry.name))
        return sorted(ours, key=lambda entry: (entry.name == RECORD, entry.name))

    @classmethod
    def check(cls, path: Path, *, force: bool, cache_dir: str | Path | None = None) -> None:
        """Raises RunDirError where `create` would, and where nothing can be kept in `cache_dir`. Changes nothing."""
        if path.exists():
            if not path.is_dir():
                raise RunDirError(f"{path} is a file, expected a folder for the run", hint="choose another --run-dir")
            if _entries(path):
                if not force and not _is_begun(path):
                    raise RunDirError(
                        f"run directory {path} exists and is not empty",
                        hint=f"--force replaces it, `trgl-device resume {path}` goes on with it, or choose another",
                    )
                if not _is_run(path):
                    raise RunDirError(
                        f"{path} is not a run directory, and --force replaces only those",
                        hint="empty it yourself, or choose another --run-dir",
                    )
                if (path / RECORD).is_file():
                    check_format(path, read_json(path / RECORD))
                with held(path):
                    pass
        parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise RunDirError(
                f"run directory {path} cannot be written: no permission in {parent}", hint="choose another --run-dir"
            )
        if cache_dir is not None:
            _check_cache_dir(Path(cache_dir))

    @classmethod
    def create(cls, path: Path, *, force: bool = False) -> "RunDir":
        """A new run directory. With `force`, the files of the run that was there are removed; no others ever are."""
        cls.check(path, force=force)
        try:
            if path.exists():
                for entry in cls(path).files():
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    else:
                        entry.unlink()
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path)
            run.modules.mkdir()
        except OSError as error:
            raise _cannot_be_made(path, error) from error
        return run

    @classmethod
    def adopt(cls, folder: Path, path: Path, *, force: bool = False) -> "RunDir":
        """A new run directory of what was staged and planned in `folder`, on the same disk; see `create`."""
        run = cls.create(path, force=force)
        # the plan first, which tells that the rest is ours too
        staged = sorted((e for e in folder.iterdir() if e.name != RECORD), key=lambda entry: entry.name != PLAN)
        try:  # the record last, when all else is on the disk: only a run that can be gone on with has one
            for entry in (*staged, folder / RECORD):
                if entry.is_file():
                    sync(entry)
            for entry in staged:
                entry.replace(path / entry.name)
            sync(path)
            (folder / RECORD).replace(path / RECORD)
            sync(path)
            sync(path.parent)
        except OSError as error:
            raise _cannot_be_made(path, error) from error
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """An existing run. Raises RunDirError where there is none, it is of another version, or has links in it.

        `path` itself may be a link to the run.
        """
        check_links(path)
        if not (path / RECORD).is_file():
            raise RunDirError(
                f"{path} is not a run directory", hint="give the folder that `train` was given or printed"
            )
        run = cls(path)
        check_format(path, run.read(RECORD))
        return run

    def write(self, name: str, record: dict[str, Any]) -> Path:
        """Write `name` atomically and durably as JSON. Raises StorageError."""
        return write_json(self.path / name, record)

    def write_text(self, name: str, text: str) -> Path:
        """Write `name` atomically and durably. Raises StorageError."""
        return write_text(self.path / name, text)

    def read(self, name: str) -> dict[str, Any]:
        """The JSON object in `name`. Raises DamagedFileError."""
        return read_json(self.path / name)

    def load(self, name: str, parse: Callable[[dict[str, Any]], T]) -> T:
        """The record in `name`, made of its JSON object by `parse`. Raises DamagedFileError."""
        values = self.read(name)
        try:
            return parse(values)
        except (LookupError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise DamagedFileError(
                f"{self.path / name} is not what this program wrote: {type(error).__name__}: {error}",
                hint="bring the file back, or start a new run",
            ) from error

    def event(self, kind: str, **values: Any) -> None:
        """Append one line to events.jsonl. Losing one in a crash harms nothing, so it is not flushed to the disk."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **values})
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            with os.fdopen(os.open(self.path / "events.jsonl", flags, 0o666), "wb") as file:
                file.write(f"{line}\n".encode())
        except OSError as error:
            raise StorageError(f"cannot write {self.path / 'events.jsonl'}: {error.strerror}") from error

    def cache_folder(self, cache_dir: str | Path | None) -> Path:
        """Where boundary activations go: inside `cache_dir` a folder of this run alone, as others may use it too."""
        if cache_dir is None:
            return self.cache
        name = hashlib.blake2b(os.fsencode(self.path.resolve()), digest_size=6).hexdigest()
        return Path(cache_dir) / f"trgl-{name}"

    def drop_staged(self) -> None:
        """Remove the weights that the run started with, once the trained ones are all in place."""
        if self.model.is_file():
            (self.path / WEIGHTS).unlink(missing_ok=True)

    def clear_cache(self, cache_dir: str | Path | None = None) -> None:
        """Remove this run's boundary activations."""
        shutil.rmtree(self.cache_folder(cache_dir), ignore_errors=True)


def _check_cache_dir(path: Path) -> None:
    """By making a folder there, and removing it: permissions do not tell of what is read-only, or no disk."""
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".trgl-", dir=parent).cleanup()
    except OSError as error:
        raise RunDirError(
            f"activations cannot be kept in {path}: {error.strerror} ({parent})", hint="choose another --cache-dir"
        ) from error


def _cannot_be_made(path: Path, error: OSError) -> RunDirError:
    return RunDirError(f"run directory {path} cannot be made: {error.strerror}", hint="choose another --run-dir")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path` of a run. Raises DamagedFileError."""
    try:
        # a network may have an infinity among its constants: attention fills with it
        return parse_object(read_bytes(path), finite=path.name != BLUEPRINT)
    except (OSError, ValueError) as error:
        raise DamagedFileError(
            f"{path} cannot be read: {(isinstance(error, OSError) and error.strerror) or error}",
            hint="the run cannot be resumed without it",
        ) from error


def check_links(path: Path) -> None:
    """Raises RunDirError where something of the run in `path` is a link, a pipe or a device: it would lead elsewhere.

    `path` itself may be a link.
    """
    refuse(odd_in(path, lambda name: _is_ours(name) or name.startswith(SCRATCH)))
    for folder in (RunDir(path).modules, RunDir(path).cache):
        check_folder(folder)
        if folder.is_file():
            raise RunDirError(f"{folder} is a file, expected a folder", hint="bring it back, or start a new run")


def check_format(path: Path, record: Mapping[str, Any]) -> None:
    """Raises RunDirError where the run in `path` is of a format that this program does not read."""
    version = record.get("format")
    if version == FORMAT and type(version) is int:
        return
    if type(version) is not int:
        raise RunDirError(f"{path} is not a run directory: {RECORD} states no format", hint="check the path")
    newer = version > FORMAT
    raise RunDirError(
        f"{path} was made by {'a newer' if newer else 'an older'} version "
        f"(format {version}, this program reads {'up to ' if newer else ''}{FORMAT})",
        hint="upgrade" if newer else "install the version that made it",
    )


def scratch_beside(path: Path) -> Path:
    """The nearest folder that exists at or above `path`: a place on the same disk."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _entries(path: Path) -> list[Path]:
    return [entry for entry in path.iterdir() if not entry.name.startswith(SCRATCH)]


def _is_ours(name: str) -> bool:
    return name in _OURS or (name.startswith(".") and name.removeprefix(".").removesuffix(".tmp") in _OURS)


def _is_begun(path: Path) -> bool:
    """Whether `path` holds nothing but the beginnings of a run: nothing is trained, and nobody can go on with it."""
    modules = RunDir(path).modules
    return not (path / RECORD).exists() and not (modules.is_dir() and _entries(modules)) and _is_ours_alone(path)


def _is_ours_alone(path: Path) -> bool:
    entries = _entries(path)
    is_bare = [entry.name for entry in entries] == ["modules"] and not _entries(entries[0])
    return is_bare or ((path / PLAN).is_file() and all(_is_ours(entry.name) for entry in entries))


def _is_run(path: Path) -> bool:
    """Whether `path` holds a run, or nothing but the beginnings of one."""
    try:
        record = parse_object(read_bytes(path / RECORD))
        return "format" in record and "config" in record
    except FileNotFoundError:
        return _is_ours_alone(path)
    except (OSError, ValueError):
        return False
