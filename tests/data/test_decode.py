"""From a picture file to the bytes of one input: the same however large the file is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ondevice_trgl.data import decode as decoding
from ondevice_trgl.data.decode import Fit, decode
from ondevice_trgl.errors import DataError

Image = pytest.importorskip("PIL.Image")
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def gradient(height: int, width: int) -> Pixels:
    """Red grows to the right, green downwards, blue along the diagonal; a dark frame tells the edges."""
    down, across = np.mgrid[0:height, 0:width]
    planes = [255 * across / (width - 1), 255 * down / (height - 1), 127 * (across / width + down / height)]
    return np.stack(planes, -1).astype(np.uint8)


@pytest.fixture
def in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of a few hundred thousand pixels count as large, and are cut into many strips."""
    monkeypatch.setattr(decoding, "_PLAIN_PIXELS", 0)
    monkeypatch.setattr(decoding, "_STRIP_PIXELS", 1 << 14)


def pixels(path: Path, fit: Fit) -> Pixels:
    return np.frombuffer(decode(path, fit), np.uint8).reshape(fit.channels, fit.height, fit.width)


def plainly(path: Path, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> Pixels:
    """As pictures of any size were small: converted, turned and scaled whole."""
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_PLAIN_PIXELS", 1 << 40)
        return pixels(path, fit)


@pytest.mark.usefixtures("in_strips")
@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("shape", [(701, 502), (502, 701)], ids=["upright", "wide"])
@pytest.mark.parametrize("fit", [Fit(3, 32, 32), Fit(1, 40, 24), Fit(3, 400, 300)], ids=str)
def test_a_large_picture_is_nearly_what_it_is_when_it_is_scaled_whole(
    tmp_path: Path, turn: int, shape: tuple[int, int], fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / "large.png"
    Image.fromarray(gradient(*shape)).save(path, exif=exif, compress_level=1)
    difference = np.abs(pixels(path, fit).astype(int) - plainly(path, fit, monkeypatch))
    assert difference.max() <= 3


@pytest.mark.usefixtures("in_strips")
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "png"), ("1", "png"), ("CMYK", "tif"), ("RGB", "webp"),
     ("P", "gif"), ("RGB", "bmp"), ("RGB", "tif"), ("I;16", "png"), ("I;16B", "tif"), ("F", "tif")],
)  # fmt: skip
def test_every_mode_is_reduced_in_strips_as_it_is_whole(
    tmp_path: Path, mode: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fit = tmp_path / f"large.{suffix}", Fit(3, 16, 16)
    picture = Image.fromarray(gradient(600, 650))
    if mode == "I;16":
        picture = Image.fromarray(np.array(picture)[:, :, 0].astype(np.uint16) * 257)
    elif mode == "I;16B":
        picture = Image.fromarray(np.array(picture)[:, :, 0].astype(">u2") * np.array(257, ">u2"))
    elif mode == "F":
        picture = Image.fromarray(np.array(picture)[:, :, 0].astype(np.float32) / 255)
    else:
        picture = picture.convert(mode)
    picture.save(path, **({"lossless": True, "method": 0} if suffix == "webp" else {}))
    difference = np.abs(pixels(path, fit).astype(int) - plainly(path, fit, monkeypatch))
    assert difference.max() <= 2


def test_levels_are_judged_by_the_whole_picture(tmp_path: Path) -> None:
    levels = np.full((1200, 1100), 0.5, np.float32)
    levels[-1, -1] = 700.0
    Image.fromarray(levels).save(tmp_path / "height.tif")
    with pytest.raises(DataError, match=r"height\.tif cannot be read .*levels \(F\) go from 0\.5 to 700\.0"):
        decode(tmp_path / "height.tif", Fit(3, 8, 8))


def test_pixels_come_channel_after_channel_and_grey_is_one(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "one.png")
    assert decode(tmp_path / "one.png", Fit(3, 2, 2)) == bytes([10] * 4 + [20] * 4 + [30] * 4)
    assert decode(tmp_path / "one.png", Fit(1, 2, 2)) == bytes([18] * 4)  # 0.299 R + 0.587 G + 0.114 B


def test_a_picture_that_is_not_square_is_cropped_in_the_middle(tmp_path: Path) -> None:
    seen = np.zeros((8, 24, 3), np.uint8)
    seen[:, 7:17] = 200
    Image.fromarray(seen).save(tmp_path / "wide.png")
    assert set(decode(tmp_path / "wide.png", Fit(3, 4, 4))) == {200}
    assert pixels(tmp_path / "wide.png", Fit(3, 8, 24))[0].tolist() == seen[:, :, 0].tolist()


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_as_stored_means_what_lies_in_the_file(tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_PLAIN_PIXELS", 0 if large else 1 << 20)
    stored = np.zeros((64, 64, 3), np.uint8)
    stored[:, 32:] = 250  # right half; upright (turned a quarter to the right) the lower one
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "sideways.png"
    Image.fromarray(stored).save(path, exif=exif)
    assert (pixels(path, Fit(1, 2, 2, "stored"))[0] > 125).astype(int).tolist() == [[0, 1], [0, 1]]
    assert (pixels(path, Fit(1, 2, 2, "exif"))[0] > 125).astype(int).tolist() == [[0, 0], [1, 1]]


def test_transparency_in_a_palette_is_dropped_without_a_word(tmp_path: Path) -> None:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 90, 80, 70])
    picture.info["transparency"] = bytes([255, 0])
    picture.save(tmp_path / "clear.png")
    assert decode(tmp_path / "clear.png", Fit(3, 1, 1)) == bytes([90, 80, 70])
