"""Class folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ondevice_trgl.data.decode import Fit, decode
from ondevice_trgl.data.folders import holdout_folder, picture_files
from ondevice_trgl.data.registry import load_data
from ondevice_trgl.errors import DataError

Image = pytest.importorskip("PIL.Image")


def fill(folder: Path, names: Sequence[str] = "ab", count: int = 10, size: tuple[int, int] = (12, 9)) -> Path:
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", size, (200 * label, 10 * index, 5)).save(folder / name / f"{index}.png")
    return folder


def test_a_folder_is_split_and_scaled(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pictures")
    (folder / "a" / "notes.txt").write_text("")
    (folder / "b" / ".hidden").write_text("")
    data = load_data(f"folder:{folder}")
    assert [len(part) for part in (data.train, data.val, data.test)] == [16, 2, 2]
    assert data.input_shape == (3, 64, 64)
    assert data.class_names == ("a", "b")
    assert "left out: 1 .txt files" in data.description  # and what is hidden never counts
    image, label = data.train[0]
    other, _ = next(sample for sample in data.train if sample[1] != label)
    assert (image[0].mean() > other[0].mean()) == (label == 1)
    assert image[0].min() == image[0].max(), "one colour stays one colour"
    assert (image[2] == 0).all()
    assert load_data(f"folder:{folder}", image_size=8).input_shape == (3, 8, 8)


def test_own_splits_are_kept(tmp_path: Path) -> None:
    for name, count in (("train", 8), ("val", 3), ("test", 4)):
        fill(tmp_path / name, count=count)
    data = load_data(f"folder:{tmp_path}", image_size=8)
    assert [len(part) for part in (data.train, data.val, data.test)] == [16, 6, 8]


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    fill(tmp_path)
    Image.new("L", (40, 20), 9).save(tmp_path / "a" / "grey.jpg")
    Image.new("RGBA", (5, 5)).save(tmp_path / "b" / "clear.png")
    assert len(load_data(f"folder:{tmp_path}", image_size=4).train) == 18


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / "b" / "3.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"b/3\.png cannot be read as an image"):
        load_data(f"folder:{tmp_path}")


def test_a_picture_that_would_decode_to_something_enormous_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    path = fill(tmp_path) / "a" / "0.png"
    with pytest.raises(DataError, match=r"a/0\.png cannot be read as an image: .*exceeds limit"):
        decode(path, Fit(3, 4, 4))


def test_folders_that_hold_nothing_to_train_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_data(f"folder:{tmp_path / 'absent'}")
    (tmp_path.parent / "file").write_text("")
    with pytest.raises(DataError, match="a file, and no folder"):
        load_data(f"folder:{tmp_path.parent / 'file'}")
    with pytest.raises(DataError, match="names no path; expected folder:PATH"):
        load_data("folder:")
    with pytest.raises(DataError, match="has no class folders"):
        load_data(f"folder:{tmp_path}")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("")
    with pytest.raises(DataError, match=r"no images; left out: 1 \.txt files"):
        load_data(f"folder:{tmp_path}")
    with pytest.raises(DataError, match="one class only"):
        load_data(f"folder:{fill(tmp_path / 'single', 'a')}")
    with pytest.raises(DataError, match="too few"):
        load_data(f"folder:{fill(tmp_path / 'tiny', 'ab', 1)}")


def test_classes_that_train_does_not_have_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "train", "ab")
    fill(tmp_path / "val", "abx")
    with pytest.raises(DataError, match=r"class folders that .*train has not: x"):
        load_data(f"folder:{tmp_path}")


def test_nothing_that_is_hidden_or_left_by_a_system_counts(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    for place in ("a/.ipynb_checkpoints", "a/__MACOSX", "__MACOSX/a", ".git", "b/@eaDir"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "copy.png")
    for name in ("a/._0.png", "b/Thumbs.db"):
        (tmp_path / name).write_bytes(b"no picture")
    data = load_data(f"folder:{folder}", image_size=8)
    assert data.class_names == ("a", "b")
    assert len(data.train) + len(data.val) + len(data.test) == 20
    assert "left out" not in data.description


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    for name in ("a/1.heic", "a/2.HEIC", "b/3.jfif"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "absent.png")
    (tmp_path / "b" / "deeper").mkdir()
    (tmp_path / "b" / "deeper" / "loop").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "again").symlink_to(tmp_path / "b" / "deeper")
    data = load_data(f"folder:{folder}", image_size=8)
    assert len(data.train) + len(data.val) + len(data.test) == 20
    assert "left out: 2 .heic files, 1 .jfif files, 1 broken links" in data.description


def test_a_folder_that_is_linked_counts_once(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "x", 5)
    folder = fill(tmp_path / "pictures")
    (folder / "a" / "more").symlink_to(tmp_path / "elsewhere" / "x")
    data = load_data(f"folder:{folder}", image_size=8)
    assert len(data.train) + len(data.val) + len(data.test) == 25


def test_a_class_without_a_picture_is_named(tmp_path: Path) -> None:
    folder = fill(tmp_path, "abc")
    for path in (folder / "c").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(DataError, match=r"no image of c; left out: 10 \.heic files"):
        load_data(f"folder:{folder}")


@pytest.mark.parametrize(
    ("names", "sizes"),
    [
        (("train", "valid", "test"), [8, 6, 4]),
        (("Training", "VAL"), None),
        (("train", "dev", "holdout"), [8, 6, 4]),
        (("train", "validation", "Testing"), [8, 6, 4]),
    ],
)
def test_splits_go_by_their_usual_names(tmp_path: Path, names: tuple[str, ...], sizes: list[int] | None) -> None:
    for name, count in zip(names, (4, 3, 2), strict=False):
        fill(tmp_path / name, count=count)
    data = load_data(f"folder:{tmp_path}", image_size=8)
    assert data.class_names == ("a", "b")
    assert f"train in {names[0]}, val in {names[1]}" in data.description
    if sizes is not None:
        assert [len(part) for part in (data.train, data.val, data.test)] == sizes


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    fill(tmp_path, ("bus", "car"))
    fill(tmp_path / "train", ("diesel", "steam"))
    data = load_data(f"folder:{tmp_path}", image_size=8)
    assert data.class_names == ("bus", "car", "train")


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train", "val", "valid"):
        fill(tmp_path / name)
    with pytest.raises(DataError, match="has val and valid, which both are val"):
        load_data(f"folder:{tmp_path}")


def test_classes_that_are_numbers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    folder = fill(tmp_path / "numbers", ("0", "2", "10"), 6)
    assert load_data(f"folder:{folder}", image_size=8).class_names == ("0", "2", "10")
    (folder / "x").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "x" / "0.png")
    assert load_data(f"folder:{fill(tmp_path / 'mixed', ('2', '10', 'x'), 6)}").class_names == ("10", "2", "x")


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.fromarray(np.full((8, 8), 25_700, np.uint16)), 100),
        (Image.fromarray(np.full((8, 8), 65_535, np.uint16)), 255),
        (Image.fromarray(np.full((8, 8), 0.4, np.float32)), 102),
        (Image.fromarray(np.full((8, 8), 51_400, np.int32)), 200),
        (Image.new("L", (8, 8), 77), 77),
        (Image.new("LA", (8, 8), (77, 0)), 77),
        (Image.new("1", (8, 8), 1), 255),
    ],
    ids=["16 bits", "white", "float", "32 bits", "8 bits", "alpha", "1 bit"],
)
def test_grey_levels_are_scaled_by_their_range(tmp_path: Path, picture: Any, expected: int) -> None:
    path = tmp_path / "picture.tif"
    picture.save(path)
    assert set(decode(path, Fit(3, 4, 4))) == {expected}


def test_levels_of_which_the_range_is_not_known_are_refused_with_file_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "height.tif"
    Image.fromarray(np.linspace(-3.0, 900.0, 64, dtype=np.float32).reshape(8, 8)).save(path)
    with pytest.raises(DataError, match=r"height\.tif cannot be read .*levels \(F\) go from -3\.0 to 900\.0"):
        decode(path, Fit(3, 4, 4))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_pictures_are_upright_as_a_person_sees_them(tmp_path: Path, suffix: str) -> None:
    seen = np.zeros((48, 48, 3), np.uint8)
    seen[:24] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"up.{suffix}"
    Image.fromarray(seen).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    pixels = np.frombuffer(decode(path, Fit(3, 4, 4)), np.uint8).reshape(3, 4, 4).transpose(1, 2, 0)
    assert pixels[0].min() > 240
    assert pixels[3].max() < 15


def test_a_held_out_folder_is_that_of_test_else_of_val_else_itself(tmp_path: Path) -> None:
    fit = Fit(3, 8, 8)
    alone = holdout_folder(fill(tmp_path / "alone", "a", 3), fit)
    assert (alone.class_names, len(alone.files), alone.part.labels.tolist()) == (("a",), 3, [0, 0, 0])
    assert alone.origin == f"images under {tmp_path / 'alone'}"
    for name in ("train", "valid"):
        fill(tmp_path / "split" / name, "ab", 2)
    found = holdout_folder(tmp_path / "split", fit)
    assert (found.origin, len(found.files)) == (f"images under {tmp_path / 'split' / 'valid'}", 4)
    fill(tmp_path / "split" / "Test", "bc", 1)
    found = holdout_folder(tmp_path / "split", fit)
    assert found.origin == f"images under {tmp_path / 'split' / 'Test'}"
    assert found.class_names == ("b", "c")
    assert found.files == tuple(tmp_path / "split" / "Test" / name / "0.png" for name in "bc")
    assert [record[::64].tolist() for rows in found.part.stream() for record in rows] == [[0, 0, 5], [200, 0, 5]]


def test_a_held_out_folder_may_have_nothing_but_its_test_split(tmp_path: Path) -> None:
    fill(tmp_path / "test", "ab", 2)
    assert holdout_folder(tmp_path, Fit(3, 8, 8)).class_names == ("a", "b")


def test_a_class_of_a_held_out_folder_may_be_called_val(tmp_path: Path) -> None:
    fill(tmp_path, ("bus", "val"), 2)
    found = holdout_folder(tmp_path, Fit(3, 8, 8))
    assert found.class_names == ("bus", "val")
    assert found.part.labels.tolist() == [0, 0, 1, 1]


def test_pictures_are_named_one_by_one_or_by_folder(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pictures", "ab", 2)
    (folder / "b" / "notes.txt").write_text("")
    one = tmp_path / "scan"  # without a suffix: it was named
    Image.new("RGB", (8, 8), (1, 2, 3)).save(one, format="png")
    found = picture_files([one, folder], Fit(3, 8, 8))
    assert found.files == (one, *(folder / name / f"{index}.png" for name in "ab" for index in (0, 1)))
    assert (found.class_names, found.part.labels.tolist()) == ((), [0] * 5)
    assert found.origin == f"images of {one}, {folder}, left out: 1 .txt files"
    assert next(iter(found.part.stream()))[0, ::64].tolist() == [1, 2, 3]
    with pytest.raises(DataError, match=r"absent\.png: no such file or folder"):
        picture_files([tmp_path / "absent.png"], Fit(3, 8, 8))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing has no images"):
        picture_files([one, tmp_path / "nothing"], Fit(3, 8, 8))
