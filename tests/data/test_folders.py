"""Class folders."""

from pathlib import Path

import pytest

from ondevice_trgl.data.registry import load_data
from ondevice_trgl.errors import DataError

Image = pytest.importorskip("PIL.Image")


def fill(folder: Path, names: str = "ab", count: int = 10, size: tuple[int, int] = (12, 9)) -> Path:
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
    assert "2 other files ignored" in data.description
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
    with pytest.raises(DataError, match=r"a/0\.png cannot be read as an image: .*exceeds limit"):
        load_data(f"folder:{fill(tmp_path)}")


def test_folders_that_hold_nothing_to_train_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_data(f"folder:{tmp_path / 'absent'}")
    with pytest.raises(DataError, match="names no folder"):
        load_data("folder:")
    with pytest.raises(DataError, match="has no class folders"):
        load_data(f"folder:{tmp_path}")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("")
    with pytest.raises(DataError, match="no images; 1 files of other kinds"):
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
