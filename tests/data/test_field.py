"""Picture folders as people have reported them, each with its neighbours; the value that is right is asserted."""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ondevice_trgl.data.decode import Fit, decode
from ondevice_trgl.data.entries import SUFFIXES
from ondevice_trgl.data.pictures import pictures_named
from ondevice_trgl.data.registry import load_data
from ondevice_trgl.errors import DataError

Image = pytest.importorskip("PIL.Image")
SIDE = 16


def fill(folder: Path, *names: str, count: int = 5) -> Path:
    """Class folders with pictures, the level of a class 50 above that of the one before."""
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (SIDE, SIDE), (50 * label, 50 * label, 50 * label)).save(folder / name / f"{index}.png")
    return folder


def counts(folder: Path) -> dict[str, list[int]]:
    """Pictures of each class, split by split."""
    listed = pictures_named(f"folder:{folder}")
    classes = range(len(listed.class_names))
    return {name: [sum(label == k for _, label in files) for k in classes] for name, files in listed.splits.items()}


def told(folder: Path) -> str:
    return pictures_named(f"folder:{folder}").told


def level(path: Path) -> int:
    """Of a picture in one colour."""
    (found,) = set(decode(path, Fit(1, 4, 4)))
    return found


@pytest.mark.parametrize(
    ("suffix", "dtype", "dim", "lit"),
    [("png", "<u2", 9_000, 52_000), ("tif", "<u2", 9_000, 52_000), ("tif", ">u2", 9_000, 52_000),
     ("pgm", "<u2", 9_000, 52_000), ("tif", "<i4", 9_000, 52_000), ("png", "u1", 35, 202)],
    ids=["png", "tiff", "tiff of the other byte order", "pgm", "32 bits", "8 bits"],
)  # fmt: skip
def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path: Path, suffix: str, dtype: str, dim: int, lit: int) -> None:
    for name, value in (("dim", dim), ("lit", lit)):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.fromarray(np.full((SIDE, SIDE), value, dtype)).save(tmp_path / name / f"{index}.{suffix}")
    assert level(tmp_path / "dim" / f"0.{suffix}") == 35  # 9 000 / 257
    assert level(tmp_path / "lit" / f"0.{suffix}") == 202
    data = load_data(f"folder:{tmp_path}", image_size=8)
    means = {label: float(image.mean()) for image, label in data.train}
    assert means[0] < means[1]


@pytest.mark.parametrize(
    ("values", "expected"),
    [((0.15,), 38), ((0.8,), 204), ((0.0,), 0), ((1.0,), 255)],
    ids=["dim", "lit", "nothing", "all"],
)
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_floats_from_nought_to_one_are_scaled(
    tmp_path: Path, values: tuple[float, ...], expected: int, compression: str | None
) -> None:
    path = tmp_path / "float.tif"
    Image.fromarray(np.full((SIDE, SIDE), values, np.float32)).save(path, compression=compression)
    assert level(path) == expected


@pytest.mark.parametrize("worst", [1.01, -0.01, 255.0, float("inf")])
def test_floats_of_another_range_are_refused_with_the_file(tmp_path: Path, worst: float) -> None:
    levels = np.full((SIDE, SIDE), 0.5, np.float32)
    levels[3, 3] = worst
    Image.fromarray(levels).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif cannot be read as an image: its levels \(F\) go from"):
        decode(tmp_path / "float.tif", Fit(3, 4, 4))


@pytest.mark.parametrize("place", [(0, 0), (3, 3), (SIDE - 1, SIDE - 1)])
def test_floats_that_are_not_a_number_are_refused_with_the_file(tmp_path: Path, place: tuple[int, int]) -> None:
    levels = np.full((SIDE, SIDE), 0.5, np.float32)
    levels[place] = float("nan")
    Image.fromarray(levels).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif cannot be read as an image: .*levels \(F\)"):
        decode(tmp_path / "float.tif", Fit(3, 4, 4))


@pytest.mark.parametrize("levels", [(0, 70_000), (-1, 5)], ids=["above", "below"])
def test_whole_numbers_of_another_range_are_refused(tmp_path: Path, levels: tuple[int, int]) -> None:
    Image.fromarray(np.array([levels] * 4, np.int32)).save(tmp_path / "counts.tif")
    with pytest.raises(DataError, match=rf"levels \(I\) go from {levels[0]} to {levels[1]}"):
        decode(tmp_path / "counts.tif", Fit(3, 4, 4))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize(
    ("turn", "corner"),
    [(1, (0, 0)), (2, (0, 1)), (3, (1, 1)), (4, (1, 0)), (5, (0, 0)), (6, (0, 1)), (7, (1, 1)), (8, (1, 0))],
)  # fmt: skip
def test_pictures_are_upright_for_every_orientation(
    tmp_path: Path, suffix: str, turn: int, corner: tuple[int, int]
) -> None:
    """The file has its first corner white; EXIF says where that is for a person."""
    stored = np.zeros((32, 32, 3), np.uint8)
    stored[:16, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(stored).save(path, exif=exif)
    for orientation, place in (("exif", corner), ("stored", corner if suffix == "tif" else (0, 0))):
        seen = np.frombuffer(decode(path, Fit(1, 32, 32, orientation)), np.uint8).reshape(32, 32)
        quarters = seen.reshape(2, 16, 2, 16).mean((1, 3))
        assert np.unravel_index(quarters.argmax(), (2, 2)) == place
        assert quarters[place] > 240 > 15 > np.sort(quarters.ravel())[2]


def test_a_training_sees_pictures_upright_or_as_stored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, first in (("up", 255), ("down", 0)):
        (tmp_path / name).mkdir()
        seen = np.full((32, 32, 3), 255 - first, np.uint8)
        seen[:16] = first
        for index in range(4):
            sideways = Image.fromarray(seen).transpose(Image.Transpose.ROTATE_90)
            sideways.save(tmp_path / name / f"{index}.png", exif=exif)
    upright = load_data(f"folder:{tmp_path}", image_size=16)
    stored = load_data(f"folder:{tmp_path}", image_size=16, orientation="stored")
    assert upright.digest != stored.digest
    assert (upright.preprocessing.orientation, stored.preprocessing.orientation) == ("exif", "stored")
    assert "as stored" in stored.description
    for image, label in upright.train:
        assert (image[:, :6].mean() > image[:, 10:].mean()) == (upright.class_names[label] == "up")
    for image, _ in stored.train:
        assert abs(float(image[:, :6].mean() - image[:, 10:].mean())) < 0.1


def test_hidden_folders_do_not_count(tmp_path: Path) -> None:
    folder = fill(tmp_path, "cats", "dogs")
    for place in ("cats/.ipynb_checkpoints", ".cache", "dogs/deeper/.thumbnails"):
        fill(tmp_path / place, "x", count=4)
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / place / "copy.png")
    assert counts(folder) == {"train": [5, 5]}
    assert told(folder) == ""


def test_what_a_mac_leaves_does_not_count(tmp_path: Path) -> None:
    folder = fill(tmp_path, "cats", "dogs")
    fork = struct.pack(">II16sH", 0x00051607, 0x00020000, b"Mac OS X", 0) + bytes(200)
    (tmp_path / "__MACOSX" / "cats").mkdir(parents=True)
    for place in ("cats/._0.png", "__MACOSX/cats/._0.png", "__MACOSX/._cats", ".DS_Store", "dogs/.DS_Store"):
        (tmp_path / place).write_bytes(fork)
    assert counts(folder) == {"train": [5, 5]}
    assert pictures_named(f"folder:{folder}").class_names == ("cats", "dogs")
    assert told(folder) == ""


@pytest.mark.parametrize("left", ["Thumbs.db", "desktop.ini", "THUMBS.DB"])
def test_what_windows_leaves_does_not_count(tmp_path: Path, left: str) -> None:
    folder = fill(tmp_path, "cats", "dogs")
    (tmp_path / "cats" / left).write_bytes(b"x")
    assert (counts(folder), told(folder)) == ({"train": [5, 5]}, "")


@pytest.mark.parametrize(
    ("inside", "left_out"),
    [([], ""), (["notes.txt"], "; left out: 1 .txt files"), ([".hidden.png"], ""),
     (["a.HEIC"], "; left out: 1 .heic files")],
)  # fmt: skip
def test_a_class_without_a_picture_is_named_with_what_is_there(
    tmp_path: Path, inside: list[str], left_out: str
) -> None:
    folder = fill(tmp_path, "cats", "dogs")
    (tmp_path / "birds").mkdir()
    for name in inside:
        (tmp_path / "birds" / name).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        counts(folder)
    assert caught.value.message == f"{folder} has no image of birds{left_out}"


def test_a_class_of_broken_links_alone_is_empty(tmp_path: Path) -> None:
    folder = fill(tmp_path, "cats", "dogs")
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "0.png").symlink_to("gone.png")
    with pytest.raises(DataError, match="has no image of birds; left out: 1 broken links"):
        counts(folder)


def test_a_class_may_be_empty_where_it_is_not_trained_on(tmp_path: Path) -> None:
    fill(tmp_path / "train", "cats", "dogs")
    fill(tmp_path / "val", "cats")
    (tmp_path / "val" / "dogs").mkdir()
    assert counts(tmp_path) == {"train": [5, 5], "val": [5, 0]}


def test_broken_links_are_counted_and_others_followed(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pictures", "cats", "dogs")
    for index in range(6):
        (folder / "cats" / f"link{index}.jpg").symlink_to(tmp_path / "gone" / f"{index}.jpg")
    (folder / "cats" / "gone").symlink_to(tmp_path / "gone")
    (folder / "dogs" / "loop.png").symlink_to("loop.png")
    (folder / "dogs" / "good.png").symlink_to(folder / "cats" / "0.png")
    assert counts(folder) == {"train": [5, 6]}
    assert told(folder) == "left out: 8 broken links"


def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    folder = fill(tmp_path, "cats", "dogs")
    os.mkfifo(tmp_path / "cats" / "pipe.png")
    assert (counts(folder), told(folder)) == ({"train": [5, 5]}, "left out: 1 .png files")


@pytest.mark.parametrize("name", ["valid", "Validation", "dev", "VAL"])
def test_validation_goes_by_its_usual_names(tmp_path: Path, name: str) -> None:
    for split, count in (("train", 4), (name, 3), ("test", 2)):
        fill(tmp_path / split, "cats", "dogs", count=count)
    assert counts(tmp_path) == {"train": [4, 4], "val": [3, 3], "test": [2, 2]}


def test_a_split_beside_what_is_none_is_a_split_where_there_are_two(tmp_path: Path) -> None:
    for split in ("train", "valid", "extra"):
        fill(tmp_path / split, "cats", "dogs", count=3)
    assert counts(tmp_path) == {"train": [3, 3], "val": [3, 3]}


@pytest.mark.parametrize("name", ["train", "test", "val", "training"])
def test_a_class_may_be_called_as_a_split(tmp_path: Path, name: str) -> None:
    fill(tmp_path, "bus", "car")
    fill(tmp_path / name, "diesel", "steam", count=2)
    assert pictures_named(f"folder:{tmp_path}").class_names == ("bus", "car", name)
    assert counts(tmp_path) == {"train": [5, 5, 4]}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_that_counts_can_be_read_whatever_its_case(tmp_path: Path, suffix: str) -> None:
    folder = fill(tmp_path, "cats", "dogs")
    path = tmp_path / "cats" / f"more{suffix.upper()}"
    Image.new("L" if suffix == ".pgm" else "RGB", (SIDE, SIDE), 120 if suffix == ".pgm" else (120,) * 3).save(path)
    assert counts(folder) == {"train": [6, 5]}
    assert abs(level(path) - 120) <= 1


@pytest.mark.parametrize(
    ("suffix", "size", "options"),
    [("png", (1700, 1300), {"compress_level": 1}), ("jpg", (1300, 1700), {}), ("tif", (1600, 1600), {})],
)
def test_one_large_picture_trains_with_the_small_ones(
    tmp_path: Path, suffix: str, size: tuple[int, int], options: dict[str, Any]
) -> None:
    folder = fill(tmp_path, "cats", "dogs", count=4)
    Image.new("RGB", size, (200, 60, 60)).save(folder / "cats" / f"large.{suffix}", **options)
    data = load_data(f"folder:{folder}", image_size=8)
    assert sum(len(part) for part in (data.train, data.val, data.test)) == 9
    planes = np.frombuffer(decode(folder / "cats" / f"large.{suffix}", Fit(3, 8, 8)), np.uint8).reshape(3, 64)
    assert np.abs(planes.astype(int) - [[200], [60], [60]]).max() <= 2
