"""A picture file as the bytes of one input: upright, cropped in the middle, scaled. The only module that imports PIL.

Imports no torch: the process that decodes holds little else. A large picture is decoded whole, as Pillow does, but
never copied whole: it is reduced in strips.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ondevice_trgl.data.entries import shown
from ondevice_trgl.errors import DataError

if TYPE_CHECKING:
    from types import ModuleType

_PLAIN_PIXELS = 1 << 20
"""Pictures of at most so many pixels are converted, turned and scaled whole."""
_STRIP_PIXELS = 1 << 19
"""Larger ones in strips of about so many pixels."""
_REDUCED = 2
"""So much larger than what is asked for a picture is at least when it was reduced by a whole factor; then bilinear."""
_OTHER_BYTES = 4_000_000
"""What opening a file brings in beside its pixels: code of its format, buffers, what the allocator keeps."""
_ORIENTATION = 0x0112
"""The EXIF tag; its values 5 to 8 swap height and width."""


@dataclass(frozen=True)
class Fit:
    """What every picture becomes: uint8, `channels` (3: RGB, 1: grey) x `height` x `width`.

    `orientation` is exif (upright, as the file says) or stored (the pixels as they lie in the file).
    """

    channels: int
    height: int
    width: int
    orientation: str = "exif"

    @property
    def record_bytes(self) -> int:
        """Bytes of one picture."""
        return self.channels * self.height * self.width


class TooLargeError(Exception):
    """A picture that takes more to decode than it may: its width and height, and the bytes."""

    def __init__(self, size: tuple[int, int], takes: int) -> None:
        super().__init__(f"{size[0]}x{size[1]} pixels take {takes} bytes to decode")
        self.size, self.takes = size, takes


def decode(path: Path, fit: Fit) -> bytes:
    """The picture in `path`: C x H x W, uint8, channel after channel. Raises DataError naming the file.

    It is cropped in the middle to the shape of `fit`, then scaled (bilinear). Alpha is dropped, of an animation the
    first picture counts, levels of 16 bits and floats from 0 to 1 are scaled to 8 bits.
    """
    return decode_within(path, fit, None)[0]


def decode_within(path: Path, fit: Fit, most_bytes: int | None) -> tuple[bytes, int]:
    """As `decode`, and what it took at most. Raises TooLargeError for what takes more than `most_bytes`, undecoded."""
    with _opened(path, fit) as (pil, image, size):
        takes = _takes(image, size, fit, path.stat().st_size)
        if most_bytes is not None and takes > most_bytes:
            raise TooLargeError(size, takes)
        fitted = _fitted(pil, image, fit)
        return b"".join(band.tobytes() for band in fitted.split()), takes


def size_of(path: Path, fit: Fit) -> tuple[int, int]:
    """Width and height as they are stored. Raises DataError naming the file."""
    with _opened(path, fit) as (_, _, size):
        return size


def decode_bytes(path: Path, fit: Fit) -> int:
    """The most memory that `decode` takes for this file, from its header alone. Raises DataError naming the file."""
    with _opened(path, fit) as (_, image, size):
        return _takes(image, size, fit, path.stat().st_size)


def pillow_version() -> str:
    """Of the library that decodes. Raises DataError where there is none."""
    return str(_pil().__version__)


def _pil() -> "ModuleType":
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise DataError(f"reading images needs Pillow: {error}", hint="`pip install pillow`") from None
    return PIL


@contextlib.contextmanager
def _opened(path: Path, fit: Fit) -> Iterator[tuple["ModuleType", Any, tuple[int, int]]]:
    """Pillow, the picture before it is decoded, and its width and height.

    Whatever fails inside, but for TooLargeError, is a DataError that names the file.
    """
    pil = _pil()
    try:
        with warnings.catch_warnings():
            # Pillow warns where a small file would decode to an enormous picture, then goes on.
            warnings.simplefilter("error", pil.Image.DecompressionBombWarning)
            with pil.Image.open(path) as image:
                # A JPEG is decoded at a half, quarter or eighth where that is still large enough: less memory.
                size, least = image.size, _REDUCED * max(fit.width, fit.height)
                image.draft("RGB", (least, least))
                yield pil, image, size
    except TooLargeError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on a damaged file
        raise DataError(
            f"{shown(path)} cannot be read as an image: {error}", hint="replace the file or take it out of the folder"
        ) from error


def _fitted(pil: "ModuleType", image: Any, fit: Fit) -> Any:
    """The picture in the mode and size of `fit`."""
    image.load()
    image.info.pop("transparency", None)  # alpha is dropped; converting would warn of it
    levels = _levels_of(pil, image)
    size, bilinear = (fit.width, fit.height), pil.Image.Resampling.BILINEAR
    if image.width * image.height <= _PLAIN_PIXELS:
        picture = _eight_bit(image, levels)
        if fit.orientation == "exif":
            picture = pil.ImageOps.exif_transpose(picture)
        fitted = pil.ImageOps.fit(picture.convert("RGB"), size, bilinear)
    else:
        # known only now: some formats have it behind the pixels, and a TIFF is turned as it is decoded
        turn = image.getexif().get(_ORIENTATION, 1) if fit.orientation == "exif" else 1
        method = _transpose(pil, turn)
        reduced, box = _reduced(pil, image, levels, size[::-1] if turn in (5, 6, 7, 8) else size)
        fitted = reduced.resize(size[::-1] if turn in (5, 6, 7, 8) else size, bilinear, box=box)
        fitted = fitted if method is None else fitted.transpose(method)
    return fitted if fit.channels == 3 else fitted.convert("L")


def _reduced(
    pil: "ModuleType", image: Any, levels: "_Levels | None", size: tuple[int, int]
) -> tuple[Any, tuple[float, float, float, float]]:
    """The part of `image` that is wanted, as RGB, smaller by a whole factor; the box of its pixels that count.

    Strips are converted and reduced one after another: the picture is never copied whole.
    """
    across, down, factor = _middle(image.size, size)
    left, top = (image.width - across) / 2, (image.height - down) / 2
    x, y = int(left), int(top)
    right, bottom = min(image.width, -int(-(left + across) // 1)), min(image.height, -int(-(top + down) // 1))
    whole = pil.Image.new("RGB", (-(-(right - x) // factor), -(-(bottom - y) // factor)))
    rows = max(1, _STRIP_PIXELS // ((right - x) * factor)) * factor
    for start in range(y, bottom, rows):
        strip = image.crop((x, start, right, min(start + rows, bottom)))
        strip = _eight_bit(strip, levels).convert("RGB")
        whole.paste(strip.reduce(factor) if factor > 1 else strip, (0, (start - y) // factor))
    box = ((left - x) / factor, (top - y) / factor, (left + across - x) / factor, (top + down - y) / factor)
    return whole, (box[0], box[1], min(box[2], whole.width), min(box[3], whole.height))


def _middle(given: tuple[int, int], wanted: tuple[int, int]) -> tuple[float, float, int]:
    """Width and height of the part of `given` that has the shape of `wanted`; the whole factor that reduces it."""
    across, down = float(given[0]), wanted[1] * given[0] / wanted[0]
    if down > given[1]:
        across, down = wanted[0] * given[1] / wanted[1], float(given[1])
    return across, down, max(1, int(min(across / wanted[0], down / wanted[1]) / _REDUCED))


def _transpose(pil: "ModuleType", turn: int) -> Any:
    """What makes a picture upright whose EXIF orientation is `turn`; None where it is."""
    methods = pil.Image.Transpose
    return {
        2: methods.FLIP_LEFT_RIGHT,
        3: methods.ROTATE_180,
        4: methods.FLIP_TOP_BOTTOM,
        5: methods.TRANSPOSE,
        6: methods.ROTATE_270,
        7: methods.TRANSVERSE,
        8: methods.ROTATE_90,
    }.get(turn)


def _takes(image: Any, size: tuple[int, int], fit: Fit, file_bytes: int) -> int:
    """What decoding `image`, which has the width and height `size` in its file of so many bytes, takes at most.

    Measured with Pillow 13, a format and mode at a time: tests/data/test_decode_memory.py.
    """
    pixels, kept = image.width * image.height, _pixel_bytes(image.mode)
    match image.format:
        case "JPEG" | "MPO":
            loading = _coefficients(image, size)
        case "TIFF":
            loading = _of_tiff(image, kept * pixels, file_bytes)
        case "PNG" | "GIF" | "BMP" | "PPM":
            in_c = not image.tile or image.tile[0][0] in ("zip", "gif", "raw")
            # a decoder in Python joins bytes: twice, and the room that they grow by
            loading = 0 if in_c else 5 * pixels * (3 if image.mode == "RGB" else kept) // 2
        case "WEBP":  # the file, two canvases and the frame
            loading = 12 * pixels + file_bytes
        case _:  # JPEG 2000 takes the most of what else Pillow reads
            loading = 16 * pixels + file_bytes
    most = max(_middle(image.size, shape)[2] for shape in ((fit.width, fit.height), (fit.height, fit.width)))
    reduced = 4 * (image.width // most + 2) * (image.height // most + 2)
    copies = 8 if kept == 1 or image.mode in ("RGB", "RGBA", "LA", "CMYK") else 16  # levels are converted twice
    fitting = 16 * pixels if pixels <= _PLAIN_PIXELS else copies * _STRIP_PIXELS + reduced
    fitting += 4 * 4 * fit.width * fit.height
    return int(kept * pixels + max(loading, fitting) + _OTHER_BYTES)  # what loading took is free before it is fitted


def _pixel_bytes(mode: str) -> int:
    """What a pixel takes in Pillow's memory."""
    return 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4


def _coefficients(image: Any, size: tuple[int, int]) -> int:
    """What a JPEG that comes in several scans holds until the last of them: two bytes a coefficient, of all sizes."""
    layers, at = image.layer, image.fp.tell()
    header = b"\xff\xda" + (6 + 2 * len(layers)).to_bytes(2, "big") + bytes([len(layers)])
    image.fp.seek(max(0, at - 8 - 2 * len(layers)))  # Pillow has read as far as the first scan's header, if it is one
    whole = image.fp.read(len(header)) == header
    image.fp.seek(at)
    if whole and not image.info.get("progressive"):
        return 0
    across, down = (max(layer[place] for layer in layers) for place in (1, 2))
    share = sum(layer[1] * layer[2] for layer in layers) / (across * down)
    return int(2 * share * (size[0] + 8 * across) * (size[1] + 8 * down))


def _of_tiff(image: Any, picture_bytes: int, file_bytes: int) -> int:
    """What a TIFF takes beside its picture: the file and a strip, where it is compressed; then the picture turned."""
    turned = picture_bytes if image.tag_v2.get(_ORIENTATION, 1) != 1 else 0
    if not image.use_load_libtiff:
        return turned
    tags = image.tag_v2
    samples = 4 if tags.get(259) == 7 else tags.get(277, 1)  # JPEG inside comes as RGBA
    across, rows = (tags[322], tags[323]) if 322 in tags else (image.width, min(tags.get(278, 1 << 31), image.height))
    strip = across * rows * samples * -(-max(tags.get(258, (8,))) // 8)
    return int(max(turned, file_bytes + strip))


@dataclass(frozen=True)
class _Levels:
    """How grey levels of more than 8 bits come to 0..255."""

    factor: float
    whole: bool


def _levels_of(pil: "ModuleType", image: Any) -> _Levels | None:
    """Of a picture with grey levels of more than 8 bits, which Pillow would cut off at 255; None for other pictures.

    Raises ValueError where the range that they are meant in is not known.
    """
    if image.mode.startswith("I;16"):
        return _Levels(1 / 257, whole=True)
    if image.mode not in ("F", "I"):
        return None
    (low, high), whole = image.getextrema(), image.mode == "I"
    if not (0 <= low <= high <= 65535 if whole else 0.0 <= low <= high <= 1.0):
        raise ValueError(f"its levels ({image.mode}) go from {low} to {high}, of which the range is not known")
    if not whole and math.isnan(image.resize((1, 1), pil.Image.Resampling.BOX).getpixel((0, 0))):
        raise ValueError(f"some of its levels ({image.mode}) are not a number")
    return _Levels(1 / 257 if whole else 255.0, whole)


def _eight_bit(image: Any, levels: _Levels | None) -> Any:
    """`image` with its levels scaled to 8 bits, where they have more."""
    if levels is None:
        return image
    factor = levels.factor
    scaled = (image.convert("I") if levels.whole else image).point(lambda level: level * factor + 0.0)
    grey = scaled.convert("L")
    grey.info = image.info
    return grey
