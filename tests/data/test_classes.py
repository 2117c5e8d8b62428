"""What datasets of the user's own say of their classes, compared."""

from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from ondevice_trgl.data.classes import check_alike, stated_classes
from ondevice_trgl.errors import DataError

ANIMALS = ("cat", "dog", "owl")


def stating(classes: Any = None, count: Any = None) -> TensorDataset:
    dataset = TensorDataset(torch.zeros(4, 1), torch.arange(4) % 2)
    if classes is not None:
        dataset.classes = classes  # type: ignore[attr-defined]
    if count is not None:
        dataset.num_classes = count  # type: ignore[attr-defined]
    return dataset


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        (stating(["cat", "dog"]), ("cat", "dog")),
        (stating(count=3), ("0", "1", "2")),
        (stating(["cat"], 3), ("cat",)),
        (stating([], 2), ("0", "1")),
        (stating(), None),
        (stating(count=True), None),
        (stating("cats"), None),
        (Subset(Subset(stating(ANIMALS), range(3)), range(2)), ANIMALS),
        (ConcatDataset([stating(ANIMALS), stating()]), ANIMALS),
        (ConcatDataset([stating(["cat", "dog"]), Subset(stating(ANIMALS), [0])]), ANIMALS),
    ],
)
def test_names_come_from_the_dataset_or_from_what_it_wraps(dataset: Any, names: tuple[str, ...] | None) -> None:
    assert stated_classes(dataset, name="x") == names


def test_a_dataset_that_wraps_itself_ends() -> None:
    dataset = stating()
    dataset.dataset = dataset  # type: ignore[attr-defined]
    assert stated_classes(dataset, name="x") is None


def test_a_number_of_classes_that_is_none_is_refused_before_they_are_named() -> None:
    with pytest.raises(DataError, match="x states 1000000000000 classes; expected at most 10000000"):
        stated_classes(stating(count=10**12), name="x")


def test_a_property_that_fails_is_told() -> None:
    class Failing:
        @property
        def classes(self) -> list[str]:
            raise KeyError("labels.txt")

    with pytest.raises(DataError, match=r"x: its attribute 'classes' cannot be read: KeyError: 'labels.txt'"):
        stated_classes(Failing(), name="x")


def test_parts_that_mean_other_classes_by_a_number_are_refused() -> None:
    both: Any = ConcatDataset([stating(["cat", "dog"]), stating(["dog", "cat"])])
    with pytest.raises(DataError, match="part 1 of x has the classes of part 0 of x in another order: dog, cat"):
        stated_classes(both, name="x")


@pytest.mark.parametrize(
    "val", [ANIMALS, ANIMALS[:2], None, ("0", "1"), ("0", "1", "2", "3")], ids=["same", "first", "none", "2", "4"]
)
def test_sets_that_mean_the_same_go_on(val: tuple[str, ...] | None) -> None:
    check_alike({"train set": ANIMALS, "val set": val})
    check_alike({"train set": ("0", "1"), "val set": ANIMALS})


@pytest.mark.parametrize(
    ("val", "message", "hint"),
    [
        (("dog", "cat", "owl"), "the classes of train set in another order: dog, cat, owl; expected cat, dog, owl",
         "label 0 is dog in one and cat in the other: number the classes alike in both"),
        (("cat", "owl"), "the classes of train set with numbers of its own: cat, owl; expected cat, dog, owl",
         "label 1 is owl in one and dog in the other"),
        (("cat", "emu", "dog", "fox"), "classes that train set has not: emu, fox",
         "the classes of train set are cat, dog, owl"),
        ((*ANIMALS, "emu"), "classes that train set has not: emu", ""),
        (tuple(f"k{i}" for i in range(14)), "classes that train set has not: k0, k1, k2, k3, k4, k5, k6, k7, k8, k9"
         " and 4 more", ""),
    ],
)  # fmt: skip
def test_sets_that_do_not_are_refused(val: tuple[str, ...], message: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        check_alike({"train set": ANIMALS, "val set": val})
    assert caught.value.message == f"val set has {message}"
    assert hint in caught.value.hint
    with pytest.raises(DataError, match=r"^test set has"):
        check_alike({"train set": ANIMALS, "val set": ANIMALS, "test set": val})
