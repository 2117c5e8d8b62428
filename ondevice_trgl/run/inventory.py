"""The runs below a folder: what each is, how it stands, and what it takes on disk. Reads JSON, loads no torch."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ondevice_trgl.bounded import parse_object, read_bytes
from ondevice_trgl.errors import RunDirError
from ondevice_trgl.run.lock import is_held
from ondevice_trgl.run.run_dir import FORMAT, PARTITION, PLAN, RECORD, REPORT, SCRATCH, WEIGHTS, RunDir

_WEIGHTS = ("modules", WEIGHTS, "model.safetensors")
_STATUSES = ("completed", "paused", "failed")


@dataclass(frozen=True)
class Run:
    """A run directory as it lies there; sizes in bytes."""

    path: Path
    status: str
    """completed | paused | failed, as its report says; in progress: a living process trains it; killed: neither;
    damaged: its record cannot be read; newer: it was made by a newer version of this program"""
    model: str | None
    """By name; None where it is a program's own, as `data`."""
    data: str | None
    budget_bytes: int | None
    weights_bytes: int
    """The network's and its modules', optimizer state included."""
    cache_bytes: int
    """Boundary activations, wherever they lie."""
    other_bytes: int
    written: float | None
    """When a file of it was written last, in seconds since 1970."""
    caches: tuple[Path, ...]
    """Folders of boundary activations that there may be."""

    @property
    def is_newer(self) -> bool:
        """Whether it was made by a newer version, which may keep other things in other places."""
        return self.status == "newer"

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.other_bytes

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON-ready values."""
        when = None if self.written is None else datetime.fromtimestamp(self.written, UTC).isoformat("T", "seconds")
        return {
            "run_dir": str(self.path),
            "status": self.status,
            "model": self.model,
            "data": self.data,
            "budget_bytes": self.budget_bytes,
            "total_bytes": self.total_bytes,
            "weights_bytes": self.weights_bytes,
            "cache_bytes": self.cache_bytes,
            "other_bytes": self.other_bytes,
            "last_written": when,
        }


def runs_below(folder: Path) -> tuple[Run, ...]:
    """`folder` itself, where it is a run, or every run below it, by path. Raises RunDirError where there is no folder.

    Links to folders are not followed, and what cannot be read is passed over.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise RunDirError(f"{folder} {what}, expected a run directory or a folder of some", hint="check the path")
    return tuple(look_at(path) for path in _found(folder))


def _found(folder: Path) -> Iterator[Path]:
    for place, names, files in os.walk(folder):
        if RECORD in files and is_run(Path(place)):
            names.clear()
            yield Path(place)
        names[:] = sorted(name for name in names if not name.startswith(SCRATCH))


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory, be its record damaged or not."""
    record = _object(path / RECORD)
    return {"format", "config"} <= record.keys() or all((path / name).is_file() for name in (RECORD, PLAN, PARTITION))


def look_at(path: Path) -> Run:
    """The run in `path`."""
    record, report = _object(path / RECORD), _object(path / REPORT)
    config, workload = _dict(record.get("config")), _dict(record.get("workload"))
    run, cache_dir = RunDir(path), config.get("cache_dir")
    caches = [run.cache]
    if isinstance(cache_dir, str):
        caches.append(run.cache_folder(cache_dir))
    sizes, written = dict.fromkeys(("weights", "cache", "other"), 0), list[float]()
    for top, size, when in _files(path, caches[1:]):
        sizes["weights" if top in _WEIGHTS else "cache" if top == run.cache.name else "other"] += size
        written.append(when)
    budget = report.get("budget_bytes", config.get("budget"))
    return Run(
        path,
        status=_status(path, record, report),
        model=_text(workload.get("model")),
        data=_text(workload.get("data")),
        budget_bytes=budget if isinstance(budget, int) else None,
        weights_bytes=sizes["weights"],
        cache_bytes=sizes["cache"],
        other_bytes=sizes["other"],
        written=max(written, default=None),
        caches=tuple(caches),
    )


def _status(path: Path, record: dict[str, Any], report: dict[str, Any]) -> str:
    if is_held(path):
        return "in progress"
    if isinstance(version := record.get("format"), int) and version > FORMAT:
        return "newer"
    if not isinstance(record.get("config"), dict):
        return "damaged"
    status = report.get("status")
    return status if status in _STATUSES else "killed"


def _files(path: Path, elsewhere: list[Path]) -> Iterator[tuple[str, int, float]]:
    """Of every file of the run: the entry of its folder that it is in, its size, and when it was written."""
    for top in _entries(path):
        yield from ((top.name, *found) for found in weighed(top))
    for folder in elsewhere:
        yield from (("cache", *found) for found in weighed(folder))


def weighed(path: Path) -> Iterator[tuple[int, float]]:
    """Size and time of writing of the file `path`, or of every file below it; links weigh nothing."""
    try:
        info = path.lstat()
    except OSError:
        return
    if stat.S_ISREG(info.st_mode):
        yield info.st_size, info.st_mtime
    elif stat.S_ISDIR(info.st_mode):
        for entry in _entries(path):
            yield from weighed(entry)


def _entries(path: Path) -> list[Path]:
    try:
        return list(path.iterdir())
    except OSError:
        return []


def _object(path: Path) -> dict[str, Any]:
    try:
        return parse_object(read_bytes(path))
    except (OSError, ValueError):
        return {}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
