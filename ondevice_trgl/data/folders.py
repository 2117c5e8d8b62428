"""Image folders, one sub-folder a class. The only module that imports PIL."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.data.source import Part, Source
from ondevice_trgl.errors import DataError

if TYPE_CHECKING:
    from types import ModuleType

DEFAULT_SIZE = 64
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def image_folder(path: Path, image_size: int | None) -> Source:
    """Class folders under `path`, or under PATH/train and, where they are there, PATH/val and PATH/test.

    Images become RGB, cropped in the middle to a square and scaled to `image_size` (default DEFAULT_SIZE), one at a
    time. Raises DataError where there is no folder, no class folder or no image; a file that is no image is an error
    when its turn comes, one with another suffix is left out and counted.
    """
    if not path.is_dir():
        raise DataError(
            f"folder:{path}: no such folder", hint="give the folder that holds one sub-folder for each class"
        )
    size = image_size if image_size is not None else DEFAULT_SIZE
    top = path / "train" if (path / "train").is_dir() else path
    classes = _class_names(top)
    files, ignored = _list(top, classes)
    others = {}
    for name in ("val", "test") if top != path else ():
        if (path / name).is_dir():
            unknown = set(_class_names(path / name)) - set(classes)
            if unknown:
                raise DataError(
                    f"{path / name} has class folders that {top} has not: {', '.join(sorted(unknown))}",
                    hint=f"the classes of {top.name} are {', '.join(classes)}",
                )
            others[name], more = _list(path / name, classes)
            ignored += more
    left_out = f", {ignored} other files ignored" if ignored else ""
    return Source(
        origin=f"images under {path} cropped to squares of {size}x{size}{left_out}",
        shape=(3, size, size),
        class_names=classes,
        train=_part(files, size),
        val=(lambda: _part(others["val"], size)) if "val" in others else None,
        test=(lambda: _part(others["test"], size)) if "test" in others else None,
    )


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))
    if not names:
        raise DataError(
            f"{folder} has no class folders", hint="put the images of each class into a sub-folder named after it"
        )
    return names


def _list(folder: Path, classes: tuple[str, ...]) -> tuple[list[tuple[Path, int]], int]:
    """The image files with their labels, sorted, and how many files of another kind there are."""
    files, ignored = [], 0
    for label, name in enumerate(classes):
        for path in sorted((folder / name).rglob("*")):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                files.append((path, label))
            elif path.is_file():
                ignored += 1
    if not files:
        raise DataError(
            f"{folder} has class folders but no images; {ignored} files of other kinds",
            hint=f"images end in {' '.join(SUFFIXES)}",
        )
    return files, ignored


def _part(files: list[tuple[Path, int]], size: int) -> Part:
    def stream() -> Iterator[Tensor]:
        pil = _pil()
        record = torch.empty(1, 3 * size * size, dtype=torch.uint8)
        view = bytes_of(record)
        pixels = torch.empty(size * size, 3, dtype=torch.uint8)
        interleaved = bytes_of(pixels)
        for path, _ in files:
            interleaved[:] = _decode(pil, path, size)
            record.view(3, -1).copy_(pixels.t())
            yield record
        view.release()

    return Part(torch.tensor([label for _, label in files], dtype=torch.int64), stream)


def _pil() -> "ModuleType":
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise DataError(f"reading images needs Pillow: {error}", hint="`pip install pillow`") from None
    return PIL


def _decode(pil: "ModuleType", path: Path, size: int) -> bytes:
    """RGB bytes, row by row, of the picture's middle square. Raises DataError naming the file."""
    try:
        with warnings.catch_warnings():
            # Pillow warns where a small file would decode to an enormous picture, then goes on.
            warnings.simplefilter("error", pil.Image.DecompressionBombWarning)
            with pil.Image.open(path) as image:
                # A JPEG is decoded at a half, quarter or eighth where that is still large enough: less memory.
                image.draft("RGB", (2 * size, 2 * size))
                fitted = pil.ImageOps.fit(image.convert("RGB"), (size, size), pil.Image.Resampling.BILINEAR)
                return bytes(fitted.tobytes())
    except Exception as error:  # Pillow's decoders raise many kinds on a damaged file
        raise DataError(
            f"{path} cannot be read as an image: {error}", hint="replace the file or take it out of the folder"
        ) from error
