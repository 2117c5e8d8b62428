"""Text files that are written whole or not at all, and are on the disk when that is done."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from ondevice_trgl.bounded import fresh
from ondevice_trgl.errors import StorageError


def write_text(path: Path, text: str) -> Path:
    """Write `path` atomically and durably, as UTF-8; bytes of file names that are none are escaped.

    Raises StorageError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with fresh(temporary) as file:
            rest = memoryview(text.encode("utf-8", "backslashreplace"))
            while rest:
                rest = rest[file.write(rest) or 0 :]
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise StorageError(
            f"cannot write {path}: {error.strerror}", hint="free some disk space, then resume"
        ) from error
    return path


def sync(path: Path) -> None:
    """Have what is in the file `path`, or the names in that folder, on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, record: dict[str, Any]) -> Path:
    """Write `path` atomically and durably as JSON. Raises StorageError."""
    return write_text(path, json.dumps(record, indent=2) + "\n")
