"""Fashion-MNIST: where it is looked for, and every way in which an idx file can be wrong."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ondevice_trgl.data.registry import load_data
from ondevice_trgl.errors import DataError
from tests.data.conftest import FASHION_FILES, idx

IMAGES, LABELS = FASHION_FILES["train"]


@pytest.mark.parametrize("zipped", [True, False])
def test_it_reads_what_was_written(write_fashion: Callable[..., Path], zipped: bool) -> None:
    folder = write_fashion(60, 20, zipped=zipped)
    data = load_data("fashion-mnist", root=folder)
    assert [len(part) for part in (data.train, data.val, data.test)] == [54, 6, 20]
    assert data.input_shape == (1, 28, 28)
    assert data.num_classes == 10
    assert data.class_names[9] == "Ankle boot"
    assert data.test.labels.tolist() == [i % 10 for i in range(20)]
    assert sorted(torch.cat([data.train.labels, data.val.labels]).tolist()) == sorted(i % 10 for i in range(60))
    raw = (folder / FASHION_FILES["t10k"][0]).with_suffix(".gz" if zipped else "")
    content = gzip.decompress(raw.read_bytes()) if zipped else raw.read_bytes()
    first = torch.tensor(list(content[16 : 16 + 784])).view(28, 28).float()
    image, _ = data.test[0]
    scaled = (first - first.mean()) / first.std()
    torch.testing.assert_close((image[0] - image.mean()) / image.std(), scaled, atol=1e-4, rtol=1e-4)


def test_it_is_found_in_each_usual_place(
    write_fashion: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {
        "debian": tmp_path / "no-debian-package",
        "cache": tmp_path / ".empty-cache" / "ondevice_trgl" / "fashion-mnist",
        "variable": tmp_path / "variable",
        "root": tmp_path / "root" / "FashionMNIST" / "raw",
    }
    monkeypatch.setenv("ONDEVICE_TRGL_DATA", str(tmp_path / "variable"))
    for test_count, folder in enumerate(places.values(), 20):  # each place wins over the ones before
        write_fashion(60, test_count, folder=folder)
        assert len(load_data("fashion-mnist", root=tmp_path / "root").test) == test_count


def test_absent_files_are_named_with_the_places_and_the_way_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_data("fashion-mnist", root=tmp_path / "mine")
    said = str(caught.value)
    assert all(name in said for pair in FASHION_FILES.values() for name in pair)
    assert str(tmp_path / "mine") in said
    assert str(tmp_path / ".empty-cache" / "ondevice_trgl" / "fashion-mnist") in said
    assert "apt install dataset-fashion-mnist" in said


def damage(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (IMAGES, lambda b: b[:-1], "truncated: 60 records of 784 bytes expected, it ends in record 59"),
        (IMAGES, lambda b: b + b"x", "goes on after the last record"),
        (IMAGES, lambda b: b[:9], "truncated in its header"),
        (IMAGES, lambda b: b"", "begins with nothing"),
        (IMAGES, lambda b: b"PK\3\4" + b[4:], "not an idx3 file .* 504b0304, expected 00000803"),
        (IMAGES, lambda b: idx((0, 0, 8, 3), (59, 28, 28), b[16:]), "59 images of 28x28; expected 60"),
        (IMAGES, lambda b: idx((0, 0, 8, 3), (60, 1 << 31, 28), b[16:]), "expected 60 .* of 28x28"),
        (LABELS, lambda b: b[:-3], "labels.* truncated"),
        (LABELS, lambda b: idx((0, 0, 8, 1), (0,), b""), "60 images .*expected 0"),
        (LABELS, lambda b: b[:-1] + b"\x0b", r"first is 11 \(sample 59\); expected 0\.\.9"),
        (LABELS, lambda b: b[:8] + bytes(60), "one class only"),
    ],
)
def test_a_malformed_file_is_named(
    write_fashion: Callable[..., Path], name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    folder = write_fashion(zipped=False)
    damage(folder, name, change)
    with pytest.raises(DataError, match=message):
        load_data("fashion-mnist", root=folder)


def test_an_empty_set_is_refused(write_fashion: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="is empty"):
        load_data("fashion-mnist", root=write_fashion(0, 0))


@pytest.mark.parametrize("change", [lambda b: b[:-20], lambda b: b"plain text", lambda b: b[:100] + b"?" * 99])
def test_a_damaged_gzip_file_is_named(write_fashion: Callable[..., Path], change: Callable[[bytes], bytes]) -> None:
    folder = write_fashion()
    damage(folder, IMAGES + ".gz", change)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz"):
        load_data("fashion-mnist", root=folder)
