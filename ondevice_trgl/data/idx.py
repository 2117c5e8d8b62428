"""Fashion-MNIST and its like: idx files, plain or gzip-compressed, read as a stream."""

import gzip
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from ondevice_trgl.bounded import opened
from ondevice_trgl.data.records import stream_file
from ondevice_trgl.data.source import Part, Source, data_dirs
from ondevice_trgl.errors import DataError

_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_MOST = 1_000_000
"""Labels: of those that are packed well, a small file could hold more than fit into memory."""
_DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def fashion_mnist(root: Path | None) -> Source:
    """Fashion-MNIST from the first folder that has all four files. Raises DataError where none has."""
    places = [(place / sub, f"{said}/{sub}" if sub else said) for place, said in data_dirs(root)
              for sub in ("", "fashion-mnist", "FashionMNIST/raw")]  # fmt: skip
    places.append((_DEBIAN_DIR, str(_DEBIAN_DIR)))
    found = next((files for place, _ in places if (files := _all_four(place)) is not None), None)
    if found is None:
        raise DataError(
            f"fashion-mnist is not here; looked for {', '.join(_FILES)} (plain or .gz)\n  in "
            + "\n  in ".join(said for _, said in places),
            hint="`apt install dataset-fashion-mnist`, or put the four files into one of these folders"
            " (--data-root PATH)",
        )
    images, labels, test_images, test_labels = found
    return Source(
        origin="Fashion-MNIST",
        shape=(1, 28, 28),
        class_names=_FASHION_CLASSES,
        train=idx_part(images, labels, (28, 28)),
        test=lambda: idx_part(test_images, test_labels, (28, 28)),
    )


def _all_four(place: Path) -> list[Path] | None:
    found = [_either(place, name) for name in _FILES]
    return [path for path in found if path is not None] if all(found) else None


def _either(place: Path, name: str) -> Path | None:
    return next((path for path in (place / f"{name}.gz", place / name) if path.is_file()), None)


def idx_part(images: Path, labels: Path, size: tuple[int, int]) -> Part:
    """The samples of an idx3 file of images, `size` = (H, W), and an idx1 file of labels.

    Labels are read here, images when streamed. Raises DataError where either is not such a file, is cut short or too
    long, or the two do not belong together.
    """
    with _reading(labels) as file:
        (count,) = _header(file, labels, dims=1)
        if count > _MOST:
            raise DataError(f"{labels} states {count} labels, expected {_MOST} at most")
        pieces = [piece.view(-1).long() for piece in stream_file(file, count, 1, what=str(labels))]
        _end(file, labels)
    with _reading(images) as file:
        header = _header(file, images, dims=3)
    if header != (count, *size):
        raise DataError(
            f"{images} holds {header[0]} images of {header[1]}x{header[2]}; expected {count} (as many as {labels.name}"
            f" has labels) of {size[0]}x{size[1]}"
        )

    def stream() -> Iterator[Tensor]:
        with _reading(images) as file:
            _header(file, images, dims=3)
            yield from stream_file(file, count, size[0] * size[1], what=str(images))
            _end(file, images)

    return Part(torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64), stream)


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """The file, decompressed. What gzip and the system say about it becomes a DataError that names it."""
    try:
        with (
            opened(path, follow=True) as raw,
            gzip.open(raw, "rb") if path.suffix == ".gz" else nullcontext(raw) as file,
        ):
            yield cast(BinaryIO, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is truncated or not a gzip file: {error}", hint="fetch the file again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _header(file: BinaryIO, path: Path, *, dims: int) -> tuple[int, ...]:
    """The sizes that an idx header of unsigned bytes states. Raises DataError where it is something else."""
    expected = bytes((0, 0, 8, dims))
    magic = file.read(4)
    if magic != expected:
        raise DataError(
            f"{path} is not an idx{dims} file of unsigned bytes: it begins with {magic.hex() or 'nothing'}, expected"
            f" {expected.hex()}"
        )
    sizes = file.read(4 * dims)
    if len(sizes) < 4 * dims:
        raise DataError(f"{path} is truncated in its header", hint="fetch the file again")
    return struct.unpack(f">{dims}I", sizes)


def _end(file: BinaryIO, path: Path) -> None:
    """Reading on to the end also checks the checksum of a gzip file."""
    if file.read(1):
        raise DataError(f"{path} goes on after the last record that its header states", hint="fetch the file again")
