"""What a safetensors file says that it holds, believed as far as its size bears it out. Imports no torch."""

import itertools
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

from ondevice_trgl.bounded import opened, parse_object
from ondevice_trgl.errors import DamagedFileError

DTYPE_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1},
    **{"U8": 1, "BOOL": 1, "C64": 8},
}
MOST_HEADER_BYTES = 16 << 20
_MOST_TENSORS = 100_000
_MOST_DIMS = 64
"""Those that torch has."""


class Entry(TypedDict):
    """A tensor in a file; offsets count from where the data start."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


Header = tuple[dict[str, Entry], dict[str, str], int]
"""Entries by name, metadata, where the data start."""


def read_header(path: Path, *, follow: bool = False) -> Header:
    """The header of `path`; a link is followed with `follow` alone. Raises DamagedFileError."""
    try:
        with opened(path, follow=follow) as file:
            return header_of(file)
    except FileNotFoundError:
        raise DamagedFileError(f"{path} is missing") from None
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error


def header_of(file: BinaryIO) -> Header:
    """The header of an open file. Raises OSError, ValueError."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(_read(file, 8), "little")
    if not 2 <= length <= size - 8:
        raise ValueError(f"it is {size} bytes long, and its header would be {length}")
    if length > MOST_HEADER_BYTES:
        raise ValueError(f"its header is {length} bytes long, expected {MOST_HEADER_BYTES} at most")
    values = parse_object(_read(file, length))
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are not text by name")
    if len(values) > _MOST_TENSORS:
        raise ValueError(f"it has {len(values)} tensors, expected {_MOST_TENSORS} at most")
    entries = {name: _entry(name, value) for name, value in values.items()}
    _check_offsets(entries, size - 8 - length)
    return entries, metadata, 8 + length


def _read(file: BinaryIO, count: int) -> bytes:
    data = b""
    while len(data) < count:
        block = file.read(count - len(data))
        if not block:
            raise ValueError("it ends in its header")
        data += block
    return data


def _entry(name: str, value: Any) -> Entry:
    """The entry `value` of the tensor `name`: as many bytes as its shape makes. Raises ValueError."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:60]} has not dtype, shape and data_offsets alone")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"{name[:60]} has dtype {str(dtype)[:20]}, expected one of {', '.join(DTYPE_BYTES)}")
    if not _are_sizes(shape) or len(shape) > _MOST_DIMS or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name[:60]} has a shape or offsets that are not whole numbers from 0")
    wanted, given = math.prod(shape) * DTYPE_BYTES[dtype], offsets[1] - offsets[0]
    if wanted != given:
        raise ValueError(f"{name[:60]} has {given} bytes, expected {wanted}")
    if math.prod(size for size in shape if size) >= 2**62:  # torch multiplies them, a zero among them or not
        raise ValueError(f"{name[:60]} has a shape that no tensor has")
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _check_offsets(entries: Mapping[str, Entry], size: int) -> None:
    """The tensors lie one behind the other, and end where the file does. Raises ValueError."""
    spans = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
    for (_, end), (begin, _) in itertools.pairwise([(0, 0), *spans]):
        if begin != end:
            raise ValueError(f"its tensors overlap or leave a gap at byte {min(begin, end)} of {size}")
    if (end := spans[-1][1] if spans else 0) != size:
        raise ValueError(f"it has {size} bytes of tensors, expected {end}")


_SUMS = "crc32"
"""In the metadata: eight hexadecimal digits a tensor, in the order of the entries, and eight of the header itself."""


def as_metadata(sums: Mapping[str, int], entries: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, str]:
    """Checksums (CRC-32) of all tensors, in the order of their entries, and of the rest of the header."""
    return {_SUMS: "".join(f"{number:08x}" for number in (*sums.values(), _of_header(entries, metadata)))}


def checksums(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, int]:
    """The CRC-32 of each tensor; none where the file was written without.

    Raises ValueError where the header is not as it was written.
    """
    text = metadata.get(_SUMS)
    if text is None:
        return {}
    *sums, own = (int(text[k : k + 8], 16) for k in range(0, len(text), 8))
    if len(sums) != len(entries) or own != _of_header(entries, metadata):
        raise ValueError("its header is not as it was written")
    return dict(zip(entries, sums, strict=True))


def _of_header(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> int:
    rest = {name: text for name, text in metadata.items() if name != _SUMS}
    return zlib.crc32(json.dumps([rest, entries]).encode())


def position_in(path: Path) -> dict[str, Any]:
    """What the file of a module says of where it stands; empty where there is none. Raises DamagedFileError."""
    if not path.exists() and not path.is_symlink():
        return {}
    entries, metadata, _ = read_header(path)
    try:
        checksums(entries, metadata)
        # states of an app's own callbacks are in it, which may hold an infinity
        return parse_object(metadata.get("position", "{}").encode("utf-8", "surrogatepass"), finite=False)
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged: its position cannot be read: {error}") from error
