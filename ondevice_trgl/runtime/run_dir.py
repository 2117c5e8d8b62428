"""The run directory: what a run has to remember, each file written whole or not at all.

config.json      workload, configuration and the command
plan.json        the plan
partition.json   the modules that were cut
events.jsonl     one JSON object a line: what happened when
modules/         weights and optimizer state, a safetensors file a module (model.store)
cache/           boundary activations, while the run needs them
model.safetensors, report.json, report.html     at the end
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from ondevice_trgl.errors import DamagedFileError, RunDirError, StorageError

FORMAT = 1
_OURS = ("config.json", "plan.json", "events.jsonl", "modules", "cache", "report.json")


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

    @classmethod
    def check(cls, path: Path, *, force: bool) -> None:
        """Raises RunDirError where `create` would. Changes nothing."""
        if path.exists():
            if not path.is_dir():
                raise RunDirError(f"{path} is a file, expected a folder for the run", hint="choose another --run-dir")
            if any(path.iterdir()):
                if not force:
                    raise RunDirError(
                        f"run directory {path} exists and is not empty",
                        hint=f"--force replaces it, `trgl-device resume {path}` goes on with it, or choose another",
                    )
                if not any((path / name).exists() for name in _OURS):
                    raise RunDirError(
                        f"{path} is not a run directory, and --force replaces only those",
                        hint="empty it yourself, or choose another --run-dir",
                    )
        parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise RunDirError(
                f"run directory {path} cannot be written: no permission in {parent}", hint="choose another --run-dir"
            )

    @classmethod
    def create(cls, path: Path, *, force: bool = False) -> "RunDir":
        """A new, empty run directory. With `force`, the run that was there is removed; anything else never is."""
        cls.check(path, force=force)
        try:
            if path.exists():
                for name in path.iterdir():
                    if name.is_dir():
                        shutil.rmtree(name)
                    else:
                        name.unlink()
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path)
            run.modules.mkdir()
        except OSError as error:
            raise RunDirError(
                f"run directory {path} cannot be made: {error.strerror}", hint="choose another --run-dir"
            ) from error
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """An existing run. Raises RunDirError where there is none, or it is of a newer version."""
        if not (path / "config.json").is_file():
            raise RunDirError(
                f"{path} is not a run directory", hint="give the folder that `train` was given or printed"
            )
        run = cls(path)
        version = run.read("config.json").get("format")
        if version != FORMAT:
            raise RunDirError(
                f"{path} has format {version!r}, this program reads {FORMAT}", hint="install the version that wrote it"
            )
        return run

    def write(self, name: str, record: dict[str, Any]) -> Path:
        """Write `name` atomically and durably as JSON. Raises StorageError."""
        return self.write_text(name, json.dumps(record, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """Write `name` atomically and durably. Raises StorageError."""
        path = self.path / name
        temporary = path.with_name(f".{name}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise StorageError(
                f"cannot write {path}: {error.strerror}", hint="free some disk space, then resume"
            ) from error
        return path

    def read(self, name: str) -> dict[str, Any]:
        """The JSON object in `name`. Raises DamagedFileError."""
        path = self.path / name
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DamagedFileError(
                f"{path} cannot be read: {error}", hint="the run cannot be resumed without it"
            ) from error
        if not isinstance(record, dict):
            raise DamagedFileError(f"{path} holds {type(record).__name__}, expected an object")
        return record

    def event(self, kind: str, **values: Any) -> None:
        """Append one line to events.jsonl. Losing one in a crash harms nothing, so it is not flushed to the disk."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **values})
        try:
            with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {self.path / 'events.jsonl'}: {error.strerror}") from error

    def clear_cache(self) -> None:
        """Remove boundary activations inside the run directory."""
        shutil.rmtree(self.cache, ignore_errors=True)
