"""Pictures listed in a CSV file."""

import os
from pathlib import Path

import pytest

from ondevice_trgl.data.pictures import pictures_named
from ondevice_trgl.data.registry import load_data
from ondevice_trgl.errors import DataError

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty pictures in images/, red from 0 to 19."""
    (tmp_path / "images").mkdir()
    for index in range(20):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    return tmp_path


def table(folder: Path, *lines: str, encoding: str = "utf-8", end: str = "\n") -> str:
    (folder / "labels.csv").write_bytes(end.join(lines).encode(encoding))
    return f"csv:{folder / 'labels.csv'}"


def test_a_table_is_a_dataset(folder: Path) -> None:
    name = table(folder, "path,label", *(f"images/{index}.png,{'ab'[index % 2]}" for index in range(20)))
    data = load_data(name, image_size=8)
    assert data.class_names == ("a", "b")
    assert [len(part) for part in (data.train, data.val, data.test)] == [16, 2, 2]
    assert data.description.startswith(f"images listed in {folder / 'labels.csv'} cropped to squares of 8x8: 16 train")
    again = load_data(name, image_size=8)
    assert again.digest == data.digest
    listed = pictures_named(name)
    assert listed.splits == {"train": [(folder / "images" / f"{index}.png", index % 2) for index in range(20)]}


@pytest.mark.parametrize(
    ("header", "delimiter", "encoding", "end"),
    [
        ("path,label", ",", "utf-8", "\n"),
        ("id,Image_Path,w,CLASS", ",", "utf-8-sig", "\r\n"),
        ("File;Category", ";", "utf-8", "\r\n"),
        ("target\tfilename", "\t", "utf-8-sig", "\n"),
        ('"image","label"', ",", "utf-8", "\n"),
        (" IMAGE , Label ,note;of,me", ",", "utf-8", "\n"),
    ],
)
def test_columns_go_by_their_usual_names_in_any_case(
    folder: Path, header: str, delimiter: str, encoding: str, end: str
) -> None:
    columns = [name.strip().strip('"').lower() for name in header.split(delimiter)]
    lines = [header]
    for index in range(3):
        cells = {"path": f"images/{index}.png", "label": f" größe {index % 2} "}
        known = {"path": ("image_path", "file", "filename", "image"), "label": ("class", "category", "target")}
        values = [
            next((cells[kind] for kind in cells if name == kind or name in known[kind]), "other") for name in columns
        ]
        lines.append(delimiter.join(values))
    listed = pictures_named(table(folder, *lines, encoding=encoding, end=end))
    assert listed.class_names == ("größe 0", "größe 1")
    assert [(path.name, label) for path, label in listed.splits["train"]] == [("0.png", 0), ("1.png", 1), ("2.png", 0)]


def test_splits_go_by_their_usual_names(folder: Path) -> None:
    rows = [(0, "cat", "Train"), (1, "dog", "training"), (2, "cat", "VALID"), (3, "dog", "test"), (4, "cat", "holdout")]
    listed = pictures_named(
        table(folder, "file,split,label", *(f"images/{index}.png,{split},{label}" for index, label, split in rows))
    )
    names = {split: [(path.stem, label) for path, label in files] for split, files in listed.splits.items()}
    assert names == {"train": [("0", 0), ("1", 1)], "val": [("2", 0)], "test": [("3", 1), ("4", 0)]}
    assert listed.origin == f"images listed in {folder / 'labels.csv'} (train, val, test)"
    held_out = pictures_named(f"csv:{folder / 'labels.csv'}", held_out=True)
    assert held_out.splits == {"test": [(folder / "images" / "3.png", 1), (folder / "images" / "4.png", 0)]}
    assert held_out.class_names == ("cat", "dog")
    assert held_out.origin == f"images listed in {folder / 'labels.csv'} (test)"


def test_a_table_without_splits_is_held_out_whole(folder: Path) -> None:
    name = table(folder, "file,label", "images/0.png,b", "images/1.png,a")
    held_out = pictures_named(name, held_out=True)
    assert [label for _, label in held_out.splits["test"]] == [1, 0]


def test_classes_that_are_numbers_are_in_the_order_of_numbers(folder: Path) -> None:
    name = table(folder, "file,label", *(f"images/{index}.png,{label}" for index, label in enumerate((10, 9, 2))))
    assert pictures_named(name).class_names == ("2", "9", "10")


def test_paths_may_be_quoted_absolute_and_in_other_bytes(folder: Path) -> None:
    odd = os.fsdecode(b"caf\xe9, red.png")
    (folder / "images" / "0.png").rename(folder / odd)
    lines = [b"path,label", b'"caf\xe9, red.png",a', str(folder / "images" / "1.png").encode() + b",caf\xe9", b""]
    (folder / "labels.csv").write_bytes(b"\n".join(lines))
    listed = pictures_named(f"csv:{folder / 'labels.csv'}")
    assert [path for path, _ in listed.splits["train"]] == [folder / odd, folder / "images" / "1.png"]
    assert listed.class_names == ("a", r"caf\xe9")


def test_a_row_that_is_there_again_counts_once(folder: Path) -> None:
    name = table(folder, "path,label", "images/0.png,a", "images/1.png,b", "", "images/../images/0.png,a")
    listed = pictures_named(name)
    assert [path.stem for path, _ in listed.splits["train"]] == ["0", "1"]
    assert listed.told == "left out: 1 repeated rows"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["name,label", "images/0.png,a"], r"no column path or file or .* in line 1: name, label"),
        (["path,kind", "images/0.png,a"], r"no column label or class or .* in line 1: path, kind"),
        ([""], r"no column path .* in line 1: "),
        (["path,label"], r"labels\.csv lists no pictures"),
        (["path,label", "images/0.png,a", "images/1.png, "], r"labels\.csv, line 3: images/1\.png has no label"),
        (["path,label", "images/0.png"], r"line 2: images/0\.png has no label"),
        (["path,label", "", ",a"], r"line 3: it names no picture"),
        (["path,label", "images/0.png,a", "images/x.png,a"], r"line 3: there is no file .*images/x\.png"),
        (["path,label", "images,a"], r"line 2: there is no file .*images"),
        (
            ["path,label", "images/0.png,a", "images/1.png,b", "./images/0.png,b"],
            r"line 4: .*images/0\.png has the label b, in line 2 a",
        ),
        (
            ["path,label,split", "images/0.png,a,train", "images/0.png,a,test"],
            r"line 3: .* split test, in line 2 train",
        ),
        (["path,label,split", "images/0.png,a,later"], r"line 2: 'later' is no split; expected train, val, test"),
        (["path,label,split", "images/0.png,a,"], r"line 2: images/0\.png has no split"),
        (["path,label,split", "images/0.png,a,test"], r"has no row to train on"),
        (
            ["path,label,set", "images/0.png,a,train", "images/1.png,b,val"],
            r"line 3: class b is not in any row of train",
        ),
        (["path,label", 'images/0.png,"a'], r"line 2: "),
    ],
)
def test_what_is_wrong_is_told_with_its_line(folder: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pictures_named(table(folder, *lines))


def test_what_is_no_table_is_told(folder: Path) -> None:
    with pytest.raises(DataError, match="names no path; expected csv:FILE"):
        load_data("csv:")
    with pytest.raises(DataError, match=r"absent\.csv: no such file"):
        load_data(f"csv:{folder / 'absent.csv'}")
    with pytest.raises(DataError, match="a folder") as caught:
        load_data(f"csv:{folder}")
    assert caught.value.hint == f"a folder of class folders is given as folder:{folder}"
