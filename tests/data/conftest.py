"""Helpers for the tests of the data room: small files in the formats that it reads."""

import gzip
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

FASHION_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "t10k": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@pytest.fixture(autouse=True)
def _no_data_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ONDEVICE_TRGL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".empty-cache"))
    monkeypatch.setattr("ondevice_trgl.data.idx._DEBIAN_DIR", tmp_path / "no-debian-package")


def idx(magic: tuple[int, int, int, int], sizes: tuple[int, ...], body: bytes) -> bytes:
    return bytes(magic) + struct.pack(f">{len(sizes)}I", *sizes) + body


@pytest.fixture
def write_fashion(tmp_path: Path) -> Callable[..., Path]:
    """Writes the four idx files with random images whose labels go 0..9 in turn; returns the folder."""

    def write(train: int = 60, test: int = 20, *, zipped: bool = True, folder: Path | None = None) -> Path:
        folder = folder or tmp_path / "fashion"
        folder.mkdir(parents=True, exist_ok=True)
        source = random.Random(7)
        for part, count in (("train", train), ("t10k", test)):
            images = idx((0, 0, 8, 3), (count, 28, 28), source.randbytes(count * 784))
            labels = idx((0, 0, 8, 1), (count,), bytes(i % 10 for i in range(count)))
            for name, content in zip(FASHION_FILES[part], (images, labels), strict=True):
                path = folder / (name + (".gz" if zipped else ""))
                path.write_bytes(gzip.compress(content, 1) if zipped else content)
        return folder

    return write
