"""Datasets of the user's own in a run: what is refused before it, and what comes up while it trains."""

from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from ondevice_trgl import DataError, RunState
from tests.run.conftest import CLASSES, At, Fit, samples

pytestmark = pytest.mark.usefixtures("code_pages_kept")


class Failing(Dataset[Any]):
    """`samples(26)`, but that reading sample 7 fails once it is `broken`."""

    def __init__(self) -> None:
        self.images, self.labels = samples(26).tensors
        self.broken = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.broken and index == 7:
            raise OSError("the card was taken out")
        return self.images[index], int(self.labels[index])


def test_a_sample_that_fails_in_mid_training_is_named_and_the_run_resumes_to_the_same_end(fit: Fit) -> None:
    fit("whole")
    data = Failing()

    def breaks(run: RunState) -> None:
        data.broken = True

    with pytest.raises(DataError, match="sample 7 of train set cannot be read: OSError: the card was taken out"):
        fit("part", train=data, callbacks=[At("on_step_end", 2, breaks)])
    data.broken = False
    assert fit("part", train=data, resume=True).status == "completed"
    assert fit.weights("part") == fit.weights("whole")


def stating(names: list[str], seed: int = 0) -> TensorDataset:
    dataset = samples(26, seed)
    dataset.classes = names  # type: ignore[attr-defined]
    return dataset


@pytest.mark.parametrize(
    ("val", "message"),
    [
        (
            ["dog", "cat", "owl"],
            "val set has the classes of train set in another order: dog, cat, owl; expected cat, dog",
        ),
        (["cat", "dog", "emu"], "val set has classes that train set has not: emu"),
    ],
)
def test_sets_that_mean_other_classes_by_one_number_are_refused(fit: Fit, val: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit("run", train=stating(["cat", "dog", "owl"]), val=stating(val, 1))
    assert not fit.path("run").exists()


def shifted(by: int, classes: int) -> TensorDataset:
    images, labels = samples(26).tensors
    return TensorDataset(images, labels % classes + by)


def test_labels_from_one_are_refused_with_the_way_out(fit: Fit) -> None:
    with pytest.raises(DataError, match="labels of the train set go from 1 to 3, expected 0 to 2") as caught:
        fit("run", train=shifted(1, CLASSES))
    assert "subtract 1" in caught.value.hint
    # to the model's three outputs two classes that leave out 0 fit; most likely they are one too high all the same
    two = shifted(1, 2)
    with pytest.raises(DataError, match="train set: labels go from 1 to 2, expected 0 to 1") as caught:
        fit("run", train=two)
    assert "`num_classes` (= 3)" in caught.value.hint
    two.num_classes = 3  # type: ignore[attr-defined]
    assert fit("run", train=two, epochs=1).status == "completed"


def test_a_val_set_without_class_0_is_fine(fit: Fit) -> None:
    assert fit("run", val=shifted(1, 2), epochs=1).status == "completed"


def test_inputs_that_are_all_the_same_are_refused(fit: Fit) -> None:
    grey = TensorDataset(torch.full((9, 1, 6, 6), 0.5), torch.arange(9) % CLASSES)
    with pytest.raises(DataError, match=r"every number of the 9 training samples of the train set is 0\.5"):
        fit("run", train=grey)
    assert fit("run", val=grey, epochs=1).status == "completed"
