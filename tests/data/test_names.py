"""Folders with names that are hard, or that are not what was meant."""

import os
import unicodedata
from pathlib import Path

import pytest

from ondevice_trgl.data.decode import Fit
from ondevice_trgl.data.entries import shown
from ondevice_trgl.data.folders import picture_files
from ondevice_trgl.data.listing import files_in
from ondevice_trgl.data.registry import load_data
from ondevice_trgl.errors import DataError, UnknownNameError

Image = pytest.importorskip("PIL.Image")
LATIN = os.fsdecode(b"caf\xe9")
"""As a system that writes UTF-8 shows a name that is none."""


def fill(folder: Path, *names: str, count: int = 6) -> Path:
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (8, 8), (40 * label, index, 0)).save(folder / name / f"{index}.png")
    return folder


def test_a_class_in_other_bytes_has_a_name_that_can_be_written(tmp_path: Path) -> None:
    data = load_data(f"folder:{fill(tmp_path, LATIN, 'bar', 'ü')}", image_size=8)
    assert data.class_names == ("bar", r"caf\xe9", "ü")
    assert sorted({label for _, label in data.train}) == [0, 1, 2]
    reds = {label: float(image[0, 0, 0]) for image, label in data.train}
    assert reds[1] < reds[0] < reds[2], "each picture keeps the label of its folder"


def test_a_path_in_other_bytes_is_read_and_can_be_written(tmp_path: Path) -> None:
    folder = fill(tmp_path / LATIN, "a", "b")
    data = load_data(f"folder:{folder}", image_size=8)
    data.description.encode("utf-8")
    assert rf"images under {tmp_path}/caf\xe9 cropped" in data.description
    found = picture_files([folder / "a" / "0.png"], Fit(3, 8, 8))
    found.origin.encode("utf-8")
    assert next(iter(found.part.stream())).shape == (1, 192)


def test_a_damaged_picture_in_other_bytes_is_named_in_text(tmp_path: Path) -> None:
    folder = fill(tmp_path, "a", "b")
    (folder / "a" / f"{LATIN}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a/caf\\xe9\.png cannot be read as an image"):
        load_data(f"folder:{folder}", image_size=8)


def test_classes_that_look_the_same_stay_two_and_are_told(tmp_path: Path) -> None:
    composed, split = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    data = load_data(f"folder:{fill(tmp_path, composed, split, 'x')}", image_size=8)
    assert sorted(data.class_names) == sorted((composed, split, "x"))
    assert "2 classes are called é, in different Unicode forms" in data.description


def test_a_split_in_another_unicode_form_is_told(tmp_path: Path) -> None:
    fill(tmp_path / "train", unicodedata.normalize("NFC", "é"), "x")
    fill(tmp_path / "val", unicodedata.normalize("NFD", "é"), "x")
    with pytest.raises(DataError, match=r"has class folders that .*train has not") as caught:
        load_data(f"folder:{tmp_path}")
    assert "written in another Unicode form there, give both one name" in caught.value.hint


@pytest.mark.parametrize("name", ["a class", "-x", "{b}", "c\nd", "%s", "'", "日本"])
def test_any_name_is_a_class(tmp_path: Path, name: str) -> None:
    assert shown(name) in load_data(f"folder:{fill(tmp_path, name, 'other')}", image_size=8).class_names


@pytest.mark.parametrize(
    ("archive", "hint"),
    [
        ("cats.zip", "unpack it: `unzip {}`, then give the folder that comes out of it"),
        ("cats.TAR", "unpack it: `tar -xf {}`, then give the folder that comes out of it"),
        ("cats.tar.gz", "unpack it: `tar -xf {}`, then give the folder that comes out of it"),
        ("cats.csv", "a table of pictures is given as csv:{}"),
        ("cats.jpg", "give the folder that holds one sub-folder for each class"),
    ],
)
def test_a_file_given_as_a_folder_is_told_what_to_do_with_it(tmp_path: Path, archive: str, hint: str) -> None:
    (tmp_path / archive).write_bytes(b"")
    with pytest.raises(DataError, match="a file, and no folder") as caught:
        load_data(f"folder:{tmp_path / archive}")
    assert caught.value.hint == hint.format(tmp_path / archive)


def test_one_level_too_high_is_told(tmp_path: Path) -> None:
    fill(tmp_path / "archive" / "photos", "a", "b")
    with pytest.raises(DataError, match="has one folder, photos, and the class folders are in that") as caught:
        load_data(f"folder:{tmp_path / 'archive'}")
    assert caught.value.hint == f"write folder:{tmp_path / 'archive' / 'photos'}"
    assert load_data(caught.value.hint.removeprefix("write "), image_size=8).class_names == ("a", "b")


def test_one_class_of_several_kinds_is_no_level_too_high(tmp_path: Path) -> None:
    fill(tmp_path / "cats", "siamese", "persian")
    Image.new("RGB", (8, 8)).save(tmp_path / "cats" / "other.png")
    with pytest.raises(DataError, match="one class only"):
        load_data(f"folder:{tmp_path}", image_size=8)


def test_pictures_without_class_folders_are_told(tmp_path: Path) -> None:
    for index in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
    with pytest.raises(DataError, match="has 3 pictures, but no class folders"):
        load_data(f"folder:{tmp_path}")


def test_a_path_without_its_kind_is_told_how_to_write_it(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("")
    (tmp_path / "pack.zip").write_text("")
    for path, hint in (
        (tmp_path, f"did you mean folder:{tmp_path}?"),
        (tmp_path / "list.csv", f"did you mean csv:{tmp_path / 'list.csv'}?"),
        (
            tmp_path / "pack.zip",
            f"{tmp_path / 'pack.zip'} is a file: pictures are given as folder:PATH, or listed in csv:FILE",
        ),
        (tmp_path / "absent", ""),
    ):
        with pytest.raises(UnknownNameError, match="unknown dataset") as caught:
            load_data(str(path))
        assert caught.value.hint == hint


def test_a_name_is_one_line_wherever_it_is_written() -> None:
    assert shown("a\nb\x1b[31m.png") == r"a\nb\x1b[31m.png"
    assert shown("über wald.png") == "über wald.png"


def test_what_is_named_and_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png is neither a file nor a folder") as caught:
        files_in([tmp_path / "pipe.png"])
    assert caught.value.hint == "write the picture to a file first"
    with pytest.raises(DataError, match=r"csv:.*pipe\.png: a pipe or a device") as caught:
        load_data(f"csv:{tmp_path / 'pipe.png'}")
    assert "read more than once" in caught.value.hint
    with pytest.raises(DataError, match="no such file or folder"):
        files_in([tmp_path / f"{'n' * 300}.png"])


def test_a_name_that_is_too_long_for_the_system_is_of_nothing(tmp_path: Path) -> None:
    long = "n" * 300
    with pytest.raises(DataError, match="no such folder"):
        load_data(f"folder:{tmp_path / long}")
    with pytest.raises(DataError, match="no such file"):
        load_data(f"csv:{tmp_path / long}")
    with pytest.raises(UnknownNameError):
        load_data(long)
    (tmp_path / "table.csv").write_text(f"path,label\n{long},a\n")
    with pytest.raises(DataError, match="line 2: there is no file"):
        load_data(f"csv:{tmp_path / 'table.csv'}")
