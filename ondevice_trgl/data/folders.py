"""Image folders, one sub-folder a class. The only module that imports PIL."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.data.listing import Listing, class_names, listed, split_folders
from ondevice_trgl.data.preprocessing import CENTER_CROP
from ondevice_trgl.data.source import Part, Source
from ondevice_trgl.errors import DataError

if TYPE_CHECKING:
    from types import ModuleType

DEFAULT_SIZE = 64


def image_folder(path: Path, image_size: int | None) -> Source:
    """Class folders under `path`, or under its train folder and, where they are there, those of val and test.

    Images become RGB (alpha is dropped, of animations the first picture counts, grey levels of 16 bits are scaled),
    upright as their EXIF orientation says, cropped in the middle to a square and scaled to `image_size` (default
    DEFAULT_SIZE), one at a time. Raises DataError where there is no folder, no class folder or no image of a class; a
    file that is no image is an error when its turn comes, one with another suffix is left out and counted.
    """
    if not path.is_dir():
        what = "a file, and no folder" if path.exists() else "no such folder"
        raise DataError(f"folder:{path}: {what}", hint="give the folder that holds one sub-folder for each class")
    size = image_size if image_size is not None else DEFAULT_SIZE
    folders = split_folders(path)
    top = folders["train"]
    classes = class_names(top)
    train = listed(top, classes, all_needed=True)
    left_out, others = train.left_out, {}
    for name in ("val", "test"):
        if name in folders:
            unknown = set(class_names(folders[name])) - set(classes)
            if unknown:
                raise DataError(
                    f"{folders[name]} has class folders that {top} has not: {', '.join(sorted(unknown))}",
                    hint=f"the classes of {top.name} are {', '.join(classes)}",
                )
            found = listed(folders[name], classes, all_needed=False)
            others[name] = found.files
            left_out += found.left_out
    splits = ", ".join(f"{name} in {folder.name}" for name, folder in folders.items()) if top != path else ""
    told = Listing(left_out=left_out).told()
    return Source(
        origin=f"images under {path}{f' ({splits})' if splits else ''} cropped to squares of {size}x{size}"
        f"{f', left out: {told}' if told else ''}",
        shape=(3, size, size),
        class_names=classes,
        resize=CENTER_CROP,
        train=_part(train.files, size),
        val=(lambda: _part(others["val"], size)) if "val" in others else None,
        test=(lambda: _part(others["test"], size)) if "test" in others else None,
    )


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
                upright = pil.ImageOps.exif_transpose(_eight_bit(image))
                fitted = pil.ImageOps.fit(upright.convert("RGB"), (size, size), pil.Image.Resampling.BILINEAR)
                return bytes(fitted.tobytes())
    except Exception as error:  # Pillow's decoders raise many kinds on a damaged file
        raise DataError(
            f"{path} cannot be read as an image: {error}", hint="replace the file or take it out of the folder"
        ) from error


def _eight_bit(image: Any) -> Any:
    """Grey levels of more than 8 bits, which Pillow would cut off at 255, scaled to them; other pictures as they are.

    Raises ValueError where the range that they are meant in is not known.
    """
    if image.mode not in ("F", "I") and not image.mode.startswith("I;16"):
        return image
    low, high = image.getextrema()
    if image.mode == "F":
        known, factor = 0.0 <= low <= high <= 1.0, 255.0
    else:
        known, factor = 0 <= low <= high <= 65535, 1 / 257
    if not known:
        raise ValueError(f"its levels ({image.mode}) go from {low} to {high}, of which the range is not known")
    levels = image if image.mode == "F" else image.convert("I")
    scaled = levels.point(lambda level: level * factor + 0.0)
    grey = scaled.convert("L")
    grey.info = image.info
    return grey
