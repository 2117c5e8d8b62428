"""Files that others may have made, or a failing disk: regular files alone, read within bounds, and nothing in them run.

Opening a pipe would wait for a writer, a device may do anything, and a link in somebody's folder leads out of it. What
is parsed is bounded in size, depth and number of values, so that no file takes more memory than its own size says.
"""

import errno
import json
import math
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

MOST_BYTES = 32 << 20
MOST_VALUES = 1_000_000
MOST_DEPTH = 100
MOST_TOML_BYTES, MOST_TOML_DEPTH = 256 << 10, 8
_MOST_TOML_STEPS = 10_000_000
"""The parser looks at all beginnings of a key with dots, which takes the square of their number."""
_MOST_INT = 2**64
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STRANGE = re.compile("[\x00\ud800-\udc7f\udd00-\udfff]")
"""No text has these; U+DC80 to U+DCFF are bytes of file names that are no UTF-8."""


def opened(path: Path, *, follow: bool = False) -> BinaryIO:
    """The regular file `path`, unbuffered. A link is followed with `follow` alone, for paths that the user named.

    Raises OSError, for whatever is no regular file too; never waits.
    """
    try:
        _check_regular(os.stat(path, follow_symlinks=follow), path)  # noqa: PTH116 -- before a device is opened
        flags = os.O_RDONLY | os.O_CLOEXEC | _flag("O_NONBLOCK") | _flag("O_NOCTTY")
        descriptor = os.open(path, flags | (0 if follow else _flag("O_NOFOLLOW")))
    except ValueError as error:  # a name with a zero byte
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    try:
        _check_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb", buffering=0)


def _flag(name: str) -> int:
    return int(getattr(os, name, 0))


def _check_regular(status: os.stat_result, path: Path) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, and no file", str(path))
    what = "is a link, which is not followed here" if stat.S_ISLNK(status.st_mode) else "is no regular file"
    raise OSError(errno.EINVAL, what, str(path))


def fresh(path: Path, mode: int = 0o666) -> BinaryIO:
    """The file `path` made anew for writing, unbuffered: whatever stood there is gone, and no link is written through.

    Raises OSError.
    """
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, mode), "wb", buffering=0)


def read_bytes(path: Path, *, most: int = MOST_BYTES, follow: bool = False) -> bytes:
    """All of the regular file `path`. Raises OSError, and for one of more than `most` bytes."""
    with opened(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        data = bytearray()
        while size <= most and (block := file.read(min(most + 1 - len(data), 1 << 20))):
            data += block
            size = max(size, len(data))
    if size > most:
        raise OSError(errno.EFBIG, f"is larger than {most >> 10} KiB", str(path))
    return bytes(data)


def parse_json(data: bytes, *, finite: bool = True) -> Any:
    """The JSON value in `data`, UTF-8. Raises ValueError.

    Also where it nests or holds too much, a key is twice in an object, a number is not of 64 bits or not finite (with
    `finite`), or text has zero bytes or halves of surrogate pairs.
    """
    bare = _STRINGS.sub(b'"', data)  # brackets and commas in text are none
    brackets = bare.translate(None, _NO_BRACKETS)
    if bare.count(b",") + len(brackets) > MOST_VALUES:
        raise ValueError(f"it holds more than {MOST_VALUES} values")
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > MOST_DEPTH:
            raise ValueError(f"it nests more than {MOST_DEPTH} deep")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_int,
            parse_float=_finite if finite else float,
            parse_constant=_no_number if finite else float,
        )
    except RecursionError:
        raise ValueError("it nests too deep") from None
    if b"\\u" in data:
        _check_text(value)
    return value


def parse_object(data: bytes, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in `data`; see `parse_json`. Raises ValueError."""
    value = parse_json(data, finite=finite)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}, expected an object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {twice[:60]!r} twice")
    return made


def _int(text: str) -> int:
    number = int(text) if len(text) <= 21 else _MOST_INT
    if not -_MOST_INT < number < _MOST_INT:
        raise ValueError(f"the number {text[:24]}{'...' if len(text) > 24 else ''} is out of bounds")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        _no_number(text[:24])
    return number


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number that JSON has")


def _check_text(value: Any) -> None:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str) and _STRANGE.search(one):
            raise ValueError(f"the text {one[:24]!a} is none")
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list):
            waiting += one


def read_toml(path: Path) -> dict[str, Any]:
    """The table in the TOML file `path`, which the user named. Raises OSError, and ValueError for what is wrong."""
    text = read_bytes(path, most=MOST_TOML_BYTES, follow=True).decode("utf-8")
    dots = [line.count(".") for line in text.split("\n")]
    if max(dots) * (sum(dots) + len(dots)) > _MOST_TOML_STEPS:
        raise ValueError("it has keys of too many parts")
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    level: list[Any] = [table]
    for _ in range(MOST_TOML_DEPTH):
        if any(isinstance(one, int) and not -_MOST_INT < one < _MOST_INT for one in level):
            raise ValueError("it has a whole number that is out of bounds")  # which could not even be written out
        level = [
            part
            for one in level
            if isinstance(one, dict | list)
            for part in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return table
    raise ValueError(f"it nests more than {MOST_TOML_DEPTH} deep")
