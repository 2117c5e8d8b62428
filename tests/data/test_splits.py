"""Splits, limits and label checks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ondevice_trgl.data.registry import load_data
from ondevice_trgl.data.splits import balanced_head, carve, check_classes, check_labels
from ondevice_trgl.errors import DataError


@given(count=st.integers(2, 300), val=st.integers(0, 100), test=st.integers(0, 100), seed=st.integers(0, 99))
def test_a_carved_set_is_a_partition(count: int, val: int, test: int, seed: int) -> None:
    if count <= val + test:
        with pytest.raises(DataError, match="too few"):
            carve(count, (val, test), seed, what="x")
        return
    parts = carve(count, (val, test), seed, what="x")
    assert [len(part) for part in parts] == [count - val - test, val, test]
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert all(torch.equal(a, b) for a, b in zip(parts, carve(count, (val, test), seed, what="x"), strict=True))


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), limit=st.integers(1, 70), seed=st.integers(0, 9))
def test_a_limited_set_is_as_even_as_can_be(labels: list[int], limit: int, seed: int) -> None:
    every = torch.tensor(labels)
    positions = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    kept = balanced_head(positions, every, limit)
    assert len(kept) == min(limit, len(labels))
    places = [positions.tolist().index(p) for p in kept.tolist()]
    assert places == sorted(places), "the order must stay"
    have = torch.bincount(every, minlength=5)
    got = torch.bincount(every[kept], minlength=5)
    # A class may have fewer than another only where it has no more to give (or lost the last draw, by one).
    assert all(got[a] >= min(have[a], got.max() - 1) for a in range(5))


def test_digits_split_and_limit() -> None:
    data = load_data("digits")
    assert [len(part) for part in (data.train, data.val, data.test)] == [1297, 200, 300]
    limited = load_data("digits", train_limit=50)
    assert [len(part) for part in (limited.train, limited.val, limited.test)] == [50, 100, 300]
    assert torch.bincount(limited.train.labels).tolist() == [5] * 10
    assert len(load_data("digits", train_limit=700).val) == 140
    assert len(load_data("digits", train_limit=10**6).train) == 1297


def test_splits_depend_on_the_seed_and_on_nothing_else() -> None:
    first, again, other = (load_data("digits", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.train.labels, again.train.labels)
    assert first.digest == again.digest
    assert not torch.equal(first.train.labels, other.train.labels)


@pytest.mark.parametrize("change", [{"seed": 1}, {"image_size": 9}, {"channels": 3}, {"train_limit": 100}])
def test_the_digest_tells_what_is_delivered(change: dict[str, int]) -> None:
    assert load_data("digits").digest != load_data("digits", **change).digest  # type: ignore[arg-type]


@pytest.mark.parametrize(("labels", "bad"), [([0, 1, -1], -1), ([0, 3, 1], 3)])
def test_labels_out_of_range_are_named(labels: list[int], bad: int) -> None:
    with pytest.raises(DataError, match=rf"first is {bad} \(sample .*expected 0\.\.2"):
        check_labels(torch.tensor(labels), 3, what="things")


def test_an_empty_set_and_a_single_class_are_refused() -> None:
    with pytest.raises(DataError, match="things is empty"):
        check_labels(torch.empty(0, dtype=torch.int64), 3, what="things")
    with pytest.raises(DataError, match="one class only"):
        check_classes(torch.tensor([2, 2]), what="things")
    with pytest.raises(DataError, match="raise the train limit of 1"):
        load_data("digits", train_limit=1)
