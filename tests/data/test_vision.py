"""CIFAR and STL-10 through a child process."""

import hashlib
import importlib.util
import io
import pickle
import sys
from pathlib import Path

import pytest
import torch

from ondevice_trgl.data import vision, vision_child
from ondevice_trgl.data.registry import load_data
from ondevice_trgl.errors import DataError

CHILD = """
import sys
from ondevice_trgl._torchvision import torchvision_module
from ondevice_trgl.data import vision_child
torchvision_module()
import torchvision.datasets
torchvision.datasets.CIFAR10.train_list = [("data_batch_1", {train!r})]
torchvision.datasets.CIFAR10.test_list = [("test_batch", {test!r})]
torchvision.datasets.CIFAR10.meta = {{"filename": "batches.meta", "key": "label_names", "md5": {meta!r}}}
vision_child.main(sys.argv[1])
"""


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_a_dataset_comes_through_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    numpy = pytest.importorskip("numpy")
    raw = torch.randint(0, 256, (40, 3 * 32 * 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def write(name: str, content: object) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(rows: torch.Tensor) -> dict[str, object]:
        return {"data": numpy.asarray(rows.tolist(), dtype="uint8"), "labels": [i % 10 for i in range(len(rows))]}

    script = tmp_path / "child.py"
    sums = {
        "train": write("data_batch_1", batch(raw[:30])),
        "test": write("test_batch", batch(raw[30:])),
        "meta": write("batches.meta", {"label_names": [f"name {i}" for i in range(10)]}),
    }
    script.write_text(CHILD.format(**sums))
    monkeypatch.setattr(vision, "CHILD", (sys.executable, str(script)))
    before = set(sys.modules)
    data = load_data("cifar10", root=tmp_path, scratch_dir=tmp_path / "scratch")
    assert not [name for name in set(sys.modules) - before if name.startswith("torchvision")]
    assert [len(part) for part in (data.train, data.val, data.test)] == [27, 3, 10]
    assert data.class_names[3] == "name 3"
    assert data.test.labels.tolist() == list(range(10))
    out = torch.empty(10, 3, 32, 32)
    data.test.read(range(10), out)
    expected = raw[30:].view(10, 3, 32, 32).float()
    for channel in range(3):  # normalised: the same up to a scale and a shift
        pair = torch.stack([out[:, channel].flatten(), expected[:, channel].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.9999
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_the_child_says_last_is_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cifar100" / "cifar-100-python").mkdir(parents=True)
    failing = "import sys; sys.exit('first\\nDataset not found or corrupted')"
    monkeypatch.setattr(vision, "CHILD", (sys.executable, "-c", failing))
    with pytest.raises(DataError, match=r"cifar100 in .*cifar100 could not be read: Dataset not found or corrupted"):
        load_data("cifar100", root=tmp_path)


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("stl10", "stl10_binary")])
def test_absent_files_are_named_with_the_places(tmp_path: Path, name: str, folder: str) -> None:
    with pytest.raises(DataError) as caught:
        load_data(name, root=tmp_path / "mine")
    said = str(caught.value)
    assert folder in said
    assert str(tmp_path / "mine" / name) in said
    assert str(tmp_path / ".empty-cache") in said
    assert "download=True" in said


def test_the_child_writes_what_the_parent_reads() -> None:
    numpy = pytest.importorskip("numpy")
    images = numpy.arange(2 * 3 * 4 * 5, dtype="uint8").reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)
    file = io.BytesIO()
    vision_child.write(file, [7, 1], images, ["a"])
    line, _, rest = file.getvalue().partition(b"\n")
    assert line == b'{"count": 2, "classes": ["a"]}'
    assert rest == bytes([7, 1]) + images.tobytes()
