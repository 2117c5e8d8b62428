"""Names, forms and what is asked of a dataset."""

import sys

import pytest
import torch

from ondevice_trgl.data.registry import data_names, load_data
from ondevice_trgl.errors import DataError, UnknownNameError


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("digit", "digits"),
        ("fasion-mnist", "fashion-mnist"),
        ("cifar", "cifar10"),
        ("sinthetic:3x8x8:2:10", "synthetic"),
    ],
)
def test_an_unknown_name_lists_the_valid_ones_and_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        load_data(name)
    said = str(caught.value)
    assert near in "".join(caught.value.suggestions)
    assert all(valid in said for valid in [*data_names(), "folder:PATH", "pkg.module:callable"])


@pytest.mark.parametrize("asked", ["image_size", "train_limit", "channels"])
def test_what_is_asked_must_be_positive(asked: str) -> None:
    with pytest.raises(DataError, match=f"{asked} is 0"):
        load_data("digits", **{asked: 0})  # type: ignore[arg-type]


def test_three_channels_do_not_become_one() -> None:
    with pytest.raises(DataError, match="has 3 channels, 1 were asked for"):
        load_data("synthetic:3x8x8:2:20", channels=1)


def test_synthetic_is_the_same_for_the_same_seed() -> None:
    first, again, other = (load_data("synthetic:3x8x6:4:50", seed=seed) for seed in (1, 1, 2))
    assert first.digest == again.digest != other.digest
    assert first.input_shape == (3, 8, 6)
    assert [len(part) for part in (first.train, first.val, first.test)] == [50, 5, 5]
    assert torch.bincount(first.train.labels).tolist() == [13, 13, 12, 12]
    assert load_data("synthetic:3x8x6:4:50", image_size=5).input_shape == (3, 5, 5)


def test_synthetic_can_be_learned() -> None:
    data = load_data("synthetic:1x16x16:5:200")
    train = torch.empty(200, 1, 16, 16)
    labels = data.train.read(range(200), train)
    means = torch.stack([train[labels == label].mean(0) for label in range(5)])
    test = torch.empty(len(data.test), 1, 16, 16)
    wanted = data.test.read(range(len(data.test)), test)
    guessed = torch.cdist(test.flatten(1), means.flatten(1)).argmin(1)
    assert (guessed == wanted).float().mean() > 0.9


@pytest.mark.parametrize(
    "spec", ["synthetic:", "synthetic", "synthetic:3x8:2:10", "synthetic:3x8x8:2", "synthetic:3x8x8:2:-1",
             "synthetic:3x8x8:2:0", "synthetic:0x8x8:2:9", "synthetic:3x8x8:1:9", "synthetic:3x99999x99999:2:9",
             "synthetic:1x1x1:2:9999999999", "synthetic:3x8x8:2:10:4"],
)  # fmt: skip
def test_a_malformed_synthetic_spec_is_refused(spec: str) -> None:
    with pytest.raises(DataError, match="synthetic:"):
        load_data(spec)


def test_no_heavy_module_was_imported_by_loading_small_data() -> None:
    before = set(sys.modules)
    load_data("digits", image_size=9)
    assert not {"torchvision", "PIL", "torch._dynamo"} & (set(sys.modules) - before)


@pytest.mark.parametrize(("name", "channels"), [("digits", 3), ("digits", None), ("synthetic:3x8x8:2:40", None)])
def test_data_that_are_normalised_as_before_are_the_same(name: str, channels: int | None) -> None:
    """By their digest, too: else an evaluation of a repeated channel would take them for other data."""
    first = load_data(name, channels=channels)
    again = load_data(name, channels=channels, known=first.preprocessing)
    assert again.digest == first.digest
    assert again.preprocessing == first.preprocessing
