"""Datasets that callers bring."""

import random
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from ondevice_trgl.data.registry import DataBundle, load_data
from ondevice_trgl.data.user import UserSet, image_set, is_callable_name
from ondevice_trgl.errors import DataError

MODULE = """
import torch
held = []
def make():
    return held[0]
def fails():
    raise KeyError("lost")
def ends():
    raise SystemExit(3)
nothing = 3
"""


class Pairs:
    def __init__(self, *samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Noisy(Pairs):
    def __getitem__(self, index: int) -> Any:
        value, label = self.samples[index]
        return value + torch.rand(value.shape), label


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """load(returned, **asked): load_data of a callable that returns it, found in the working directory."""
    (tmp_path / "brought.py").write_text(MODULE)
    (tmp_path / "program.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "brought", raising=False)

    def call(returned: Any, **asked: Any) -> DataBundle:
        with pytest.raises(DataError):
            load_data("brought:nothing")
        sys.modules["brought"].held[:] = [returned]
        return load_data("brought:make", **asked)

    return call


def images(count: int, shape: tuple[int, ...] = (1, 4, 4), classes: int = 3) -> Pairs:
    return Pairs(*[(torch.full(shape, float(i)), i % classes) for i in range(count)])


def test_one_dataset_is_split_and_delivered_as_it_is(load: Any) -> None:
    data = load(images(30))
    assert [len(part) for part in (data.train, data.val, data.test)] == [24, 3, 3]
    assert (data.num_classes, data.input_shape) == (3, (1, 4, 4))
    out = torch.zeros(9, 1, 4, 4)
    labels = data.train.read([5, 0, 7], out)
    assert [value % 3 for value in out[:3, 0, 0, 0].tolist()] == labels.tolist()
    assert torch.equal(labels, data.train.labels[[5, 0, 7]])
    everything = sorted(float(x[0, 0, 0]) for part in (data.train, data.val, data.test) for x, _ in part)
    assert everything == [float(i) for i in range(30)]


def test_pairs_and_triples_keep_their_parts(load: Any) -> None:
    data = load((images(20), images(7)))
    assert [len(part) for part in (data.train, data.val, data.test)] == [18, 7, 2]
    data = load((images(20), images(7), images(5)), train_limit=6)
    assert [len(part) for part in (data.train, data.val, data.test)] == [6, 7, 5]


def test_resizing_and_repeating_work_on_images_only(load: Any) -> None:
    data = load(images(20), image_size=6, channels=3)
    assert data.input_shape == (3, 6, 6)
    image, _ = data.train[0]
    assert image.shape == (3, 6, 6)
    with pytest.raises(DataError, match="need images, C x H x W"):
        load(images(20, (5,)), image_size=6)
    assert load(images(20, (5,))).input_shape == (5,)


def test_bytes_become_fractions(load: Any) -> None:
    data = load(Pairs(*[(torch.tensor([[[0, 51], [102, 255]]], dtype=torch.uint8), i % 2) for i in range(10)]))
    assert torch.equal(data.train[0][0], torch.tensor([[[0.0, 0.2], [0.4, 1.0]]]))


def test_classes_come_from_the_dataset_also_through_a_subset(load: Any) -> None:
    named = TensorDataset(torch.arange(80.0).view(20, 1, 2, 2), torch.arange(20) % 2)
    named.classes = ["no", "yes", "unsure"]  # type: ignore[attr-defined]
    assert load(Subset(named, range(15))).class_names == ("no", "yes", "unsure")


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((torch.zeros(1, 4, 5), 0), r"sample 2 of brought:make \(train\) has shape 1x4x5; expected 1x4x4"),
        ((torch.zeros(1, 4, 4), -1), r"first is -1 \(sample 2\); expected 0\.\.1"),
        ((torch.zeros(1, 4, 4), 0.5), "label of sample 2 .* is 0.5; expected a whole number"),
        (torch.zeros(1, 4, 4), "sample 2 .* is a Tensor; expected a pair"),
        (([0.0], 1), "input of sample 2 .* is a list of 1; expected a torch.Tensor"),
    ],
)
def test_a_bad_sample_is_named(load: Any, sample: Any, message: str) -> None:
    good = [(torch.zeros(1, 4, 4), i % 2) for i in range(9)]
    with pytest.raises(DataError, match=message):
        load(Pairs(*good[:2], sample, *good[2:]))


def test_a_validation_label_that_train_does_not_have_is_refused(load: Any) -> None:
    with pytest.raises(DataError, match=r"\(val\): 1 labels are out of range, the first is 4"):
        load((images(20), Pairs((torch.zeros(1, 4, 4), 4))))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (Pairs(), "is empty"),
        (images(20, classes=1), "one class only"),
        (iter([1]), "expected a map-style dataset"),
        ((images(3),) * 4, "returned 4 datasets"),
        ((), "returned 0 datasets"),
        ({"train": images(9), "val": images(9)}, r"returned a dict; expected a dataset or \(train, val"),
        ([images(9), images(9)], "sample 0 of brought:make .train. is a Pairs; expected a pair"),
        ((torch.zeros(9, 2), torch.zeros(9)), "is a Tensor; expected a pair"),
    ],
)
def test_what_is_no_dataset_is_refused(load: Any, returned: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(returned)


@pytest.mark.parametrize(
    ("name", "callable_"),
    [
        ("own:make", True),
        ("pkg.own:make_2", True),
        ("folder:birds", False),
        ("synthetic:a", False),
        ("digits", False),
        ("own:make it", False),
        ("own.py:", False),
    ],
)
def test_the_names_of_callables_are_told_from_others(name: str, callable_: bool) -> None:
    assert is_callable_name(name) == callable_


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_here:make", "importing no_such_module_here failed: ModuleNotFoundError"),
        ("brought:absent", "has no callable 'absent'"),
        ("brought:nothing", "has no callable 'nothing'"),
        ("brought:fails", "failed: KeyError: 'lost'"),
        ("brought:ends", "failed: SystemExit: 3"),
        ("program:make", "importing program failed: SystemExit: 0\n  hint: what it does as a program belongs under"),
    ],
)
def test_a_callable_that_cannot_be_called_is_said(load: Any, name: str, message: str) -> None:
    before = list(sys.path)
    with pytest.raises(DataError, match=message):
        load_data(name)
    assert sys.path == before


DRAWING = """
import random
import numpy
import torch
from torch.utils.data import TensorDataset, random_split
at_import = torch.rand(1)
def make():
    made = torch.rand(60, 1, 2, 2) + random.random() + float(numpy.random.rand()) + at_import
    return tuple(random_split(TensorDataset(made, torch.arange(60) % 3), [50, 10]))
"""


def test_what_a_callable_draws_comes_from_the_seed_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "drawing.py").write_text(DRAWING)
    monkeypatch.chdir(tmp_path)

    def digest(seed: int) -> str:
        monkeypatch.delitem(sys.modules, "drawing", raising=False)
        states = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state()
        found = load_data("drawing:make", seed=seed).digest
        assert (random.getstate(), str(numpy.random.get_state())) == states[:2]
        assert torch.equal(torch.get_rng_state(), states[2])
        for draw in (random.random, numpy.random.rand, lambda: torch.rand(1)):
            draw()  # whatever was drawn before does not matter
        return found

    assert digest(3) == digest(3) != digest(4)


def test_the_digest_follows_pixels_but_not_augmentation(load: Any) -> None:
    def changed(value: float) -> Pairs:
        return Pairs(*[(torch.full((1, 4, 4), value + i), i % 2) for i in range(20)])

    assert load(changed(1)).digest == load(changed(1)).digest != load(changed(2)).digest
    noisy = Noisy(*changed(1).samples)
    assert load(noisy).digest == load(noisy).digest


def test_a_dataset_that_is_handed_over(load: Any) -> None:
    wrapped = image_set(images(6))
    assert isinstance(wrapped, UserSet)
    assert image_set(wrapped) is wrapped
    out = torch.empty(6, 1, 4, 4)
    assert wrapped.read(range(6), out).tolist() == [0, 1, 2, 0, 1, 2]
    assert out[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(DataError, match=r"expected 0\.\.1"):
        image_set(images(6), num_classes=2)


def test_a_label_that_changes_while_reading_is_checked() -> None:
    class Turning(Pairs):
        turned = False

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.zeros(1, 2, 2), 9 if self.turned else index % 2

    dataset = Turning(*range(4))
    wrapped = image_set(dataset)
    dataset.turned = True
    with pytest.raises(DataError, match=r"sample 3 of dataset is 9; expected 0\.\.1"):
        wrapped[3]


def stating(names: list[str], count: int = 20) -> Pairs:
    dataset = images(count)
    dataset.classes = names  # type: ignore[attr-defined]
    return dataset


def test_classes_of_the_sets_are_compared_by_name(load: Any) -> None:
    names = ["cat", "dog", "owl"]
    assert load((stating(names), stating(names))).class_names == ("cat", "dog", "owl")
    assert load((stating(names), images(9))).class_names == ("cat", "dog", "owl")
    with pytest.raises(
        DataError, match=r"\(val\) has the classes of brought:make \(train\) in another order: dog, cat"
    ):
        load((stating(names), stating(["dog", "cat", "owl"])))
    with pytest.raises(DataError, match=r"\(test\) has classes that brought:make \(train\) has not: emu"):
        load((stating(names), stating(names), stating(["cat", "emu", "owl"])))


def test_labels_from_one_are_refused_unless_class_0_is_stated(load: Any) -> None:
    from_one = Pairs(*[(torch.full((1, 4, 4), float(i)), i % 3 + 1) for i in range(30)])
    with pytest.raises(DataError, match=r"\(train\): labels go from 1 to 3, expected 0 to 2") as caught:
        load(from_one)
    assert "subtract 1" in caught.value.hint
    assert "`num_classes` (= 4)" in caught.value.hint
    from_one.num_classes = 4  # type: ignore[attr-defined]
    assert load(from_one).num_classes == 4
    from_one.num_classes = 3  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"\(train\): labels go from 1 to 3, expected 0 to 2"):
        load(from_one)
    assert load((images(30), Pairs(*from_one.samples[:2]))).num_classes == 3  # a val set may lack class 0


def test_a_label_that_would_make_millions_of_classes_is_refused_unless_they_are_stated(load: Any) -> None:
    wild = Pairs(*images(20).samples, (torch.zeros(1, 4, 4), 10**12))
    with pytest.raises(DataError, match=r"\(train\): the highest label is 1000000000000, of 21 samples"):
        load(wild)


def test_the_split_of_own_data_respects_classes_and_says_what_was_given(load: Any) -> None:
    data = load(images(60))
    for part, each in ((data.train, 16), (data.val, 2), (data.test, 2)):
        assert torch.bincount(part.labels).tolist() == [each] * 3
    with pytest.raises(DataError, match=r"brought:make has 3 samples in 3 classes: the smallest, cat, has 1; too few"):
        load(stating(["cat", "dog", "owl"], 3))
    with pytest.raises(DataError, match=r"train limit of 2 leaves some of the 3 classes of brought:make, which has 60"):
        load(images(60), train_limit=2)


def test_uneven_classes_are_in_the_description(load: Any) -> None:
    uneven = Pairs(*[(torch.full((1, 4, 4), float(i)), int(i < 4)) for i in range(40)])
    uneven.classes = ["cat", "dog"]  # type: ignore[attr-defined]
    told = "; 3 to 29 samples a class (smallest dog, largest cat; --balance draws all classes equally often)"
    assert load(uneven).description.endswith(told)
    assert "samples a class" not in load(images(40)).description


def test_inputs_that_are_all_the_same_are_refused(load: Any) -> None:
    grey = Pairs(*[(torch.full((1, 4, 4), 7, dtype=torch.uint8), i % 2) for i in range(20)])
    with pytest.raises(DataError, match=r"every number of the 20 training samples of brought:make \(train\) is 7"):
        load(grey)
    assert len(load((images(20), grey)).val) == 20
