"""Pictures that were decoded before: one raw file of uint8 records in the user's cache folder, read where it lies.

    pictures/KEY.u8     the records, one after another
    pictures/KEY.json   written last: how many, how large, what made them

KEY says which files, how large, how old and when changed, and what every picture becomes; labels are not in it. Imports
no torch.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from ondevice_trgl.bounded import opened, parse_object, read_bytes
from ondevice_trgl.data.decode import Fit, pillow_version
from ondevice_trgl.data.source import cache_dir

_FORMAT = 1
MOST_BYTES = 4_000_000_000
"""What the prepared files may take together; those that were not used for longest go first."""
MOST_FILES = 200
"""And how many of them there may be: single pictures that were asked about are small, and come often."""
_LEAST_FREE = 10
"""And the share of the disk that they leave free: a tenth."""
_MOST_JSON_BYTES = 64 << 10
_PARTIAL = ".part"
_ABANDONED_SECONDS = 24 * 3600
"""A partial file that nobody wrote to for so long belongs to a process that was killed."""


def prepared_dir() -> Path:
    """Where prepared pictures are."""
    return cache_dir() / "pictures"


def key_of(files: Sequence[Path], fit: Fit) -> str:
    """What the records of those files depend on, as a name. A file that cannot be looked at counts as empty."""
    digest = hashlib.blake2b(json.dumps([_FORMAT, pillow_version(), vars(fit)]).encode(), digest_size=16)
    for path in files:
        try:
            status = os.stat(path)  # noqa: PTH116 -- tens of thousands of them
            # the last cannot be set: a file of the same size is put there with another's time by rsync, tar, cp -p
            stamp = f"\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\0"
        except OSError:  # decoding it will say so
            stamp = "\0\0\0"
        digest.update(os.fsencode(os.path.abspath(path)) + stamp.encode())  # noqa: PTH100
    return digest.hexdigest()


def find(key: str, count: int, record_bytes: int) -> BinaryIO | None:
    """The prepared file of `key`, open, with `count` records; None where it is not there, torn or another's.

    It stays readable for whoever opened it, even when it is removed meanwhile.
    """
    path = prepared_dir() / f"{key}.u8"
    try:
        made = parse_object(read_bytes(path.with_suffix(".json"), most=_MOST_JSON_BYTES))
        file = opened(path)
    except (OSError, ValueError):
        return None
    is_known = (made.get("count"), made.get("record_bytes")) == (count, record_bytes)
    if not is_known or os.fstat(file.fileno()).st_size != count * record_bytes:
        file.close()
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used just now: the last to be removed
    return file


def is_there(key: str, count: int, fit: Fit) -> bool:
    """Whether `find` finds it."""
    file = find(key, count, fit.record_bytes)
    if file is not None:
        file.close()
    return file is not None


def store(key: str, records: Iterable[bytes], count: int, fit: Fit, keep: Iterable[str] = ()) -> None:
    """Write the prepared file of `key`. Several processes may do so at once: each writes its own, the last one stays.

    Files that were not used for longest make room for it, but for those of the keys in `keep`. Raises OSError where
    it cannot be written, and whatever `records` raises; nothing is left of it then.
    """
    folder = prepared_dir()
    folder.mkdir(parents=True, exist_ok=True)
    make_room(folder, count * fit.record_bytes, {key, *keep})
    made = {"count": count, "record_bytes": fit.record_bytes, "format": _FORMAT, "fit": vars(fit)}
    made["pillow"] = pillow_version()
    _write(folder / f"{key}.u8", records)
    _write(folder / f"{key}.json", [json.dumps(made).encode()])


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    """A file that is there whole or not at all, on the disk when this returns."""
    handle, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=_PARTIAL, dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def make_room(folder: Path, need: int, keep: Iterable[str]) -> None:
    """Remove prepared files in `folder`, least recently used first, until `need` more bytes are within the bounds."""
    kept, known = set(keep), []
    newest = 0.0
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):  # another process was faster
                status = entry.stat()
                newest = max(newest, status.st_mtime)
                known.append((status.st_mtime_ns, status.st_size, folder / entry.name))
    for modified, _, path in known:
        if path.suffix == _PARTIAL and modified / 1e9 < newest - _ABANDONED_SECONDS:
            _remove(path)
    files = sorted(one for one in known if one[2].suffix == ".u8")
    disk, total = shutil.disk_usage(folder), sum(size for _, size, _ in files)
    bound = min(MOST_BYTES, total + disk.free - disk.total // _LEAST_FREE)
    surplus = len(files) + 1 - MOST_FILES
    for _, size, path in files:
        if total + need <= bound and surplus <= 0:
            return
        if path.stem not in kept:
            _remove(path.with_suffix(".json"))
            _remove(path)
            total, surplus = total - size, surplus - 1


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
