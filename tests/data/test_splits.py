"""Splits, limits and label checks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ondevice_trgl.data.bundle import Asked
from ondevice_trgl.data.registry import load_data
from ondevice_trgl.data.splits import balanced_head, carve, check_classes, check_labels, check_zero_used
from ondevice_trgl.errors import DataError

LABELS = st.lists(st.integers(0, 5), min_size=2, max_size=80)


def counts(labels: Tensor, parts: list[Tensor], classes: int) -> list[list[int]]:
    return [torch.bincount(labels[part], minlength=classes).tolist() for part in parts]


@given(labels=LABELS, val=st.integers(1, 40), test=st.integers(1, 40), seed=st.integers(0, 99))
def test_a_carved_set_is_a_partition_that_leaves_every_class_in_train(
    labels: list[int], val: int, test: int, seed: int
) -> None:
    every = torch.tensor(labels)
    room = len(labels) - len(set(labels))
    if room < 2:
        with pytest.raises(DataError, match=f"x has {len(labels)} samples in {len(set(labels))} classes"):
            carve(every, (val, test), seed, what="x")
        return
    parts = carve(every, (val, test), seed, what="x")
    sizes = [len(part) for part in parts]
    assert sum(sizes) == len(labels)
    if val + test <= room:
        assert sizes[1:] == [val, test]
    else:  # as many as there are to give, but for rounding, and one for each
        assert len(set(labels)) <= sizes[0] <= len(set(labels)) + 1
        assert 1 <= sizes[1] <= val
        assert 1 <= sizes[2] <= test
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    assert set(every[parts[0]].tolist()) == set(labels)
    again = carve(every, (val, test), seed, what="x")
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


@given(of_class=st.lists(st.integers(3, 40), min_size=2, max_size=6), seed=st.integers(0, 9))
def test_every_class_gives_its_share_to_each_part(of_class: list[int], seed: int) -> None:
    labels = torch.arange(len(of_class)).repeat_interleave(torch.tensor(of_class))
    size = len(labels) // 10 or 1
    _, val, test = counts(labels, carve(labels, (size, size), seed, what="x"), len(of_class))
    for have, a, b in zip(of_class, val, test, strict=True):
        share = have * size / len(labels)
        assert abs(a - share) < 1
        assert abs(a + b - 2 * share) < 2


def test_rounding_owes_to_the_next_part_what_it_did_not_give_to_the_last() -> None:
    labels = torch.arange(4).repeat_interleave(15)
    train, val, test = counts(labels, carve(labels, (6, 6), 0, what="x"), 4)
    assert val == [2, 2, 1, 1]
    assert test == [1, 1, 2, 2]
    assert train == [12, 12, 12, 12]


def test_a_class_of_one_sample_stays_whole_in_train() -> None:
    labels = torch.tensor([0] * 40 + [1] * 9 + [2])
    assert counts(labels, carve(labels, (5, 5), 3, what="x"), 3) == [[32, 7, 1], [4, 1, 0], [4, 1, 0]]


def test_where_classes_have_too_few_the_parts_become_smaller() -> None:
    labels = torch.arange(10).repeat(2)[:13]  # three classes of two samples, seven of one
    sizes = [len(part) for part in carve(labels, (4, 4), 0, what="x")]
    assert sizes == [11, 1, 1]


def test_a_class_for_every_sample_leaves_nothing_to_put_aside_and_the_message_counts() -> None:
    names = [f"k{index}" for index in range(10)]
    with pytest.raises(DataError) as caught:
        carve(torch.arange(10), (1, 1), 0, what="birds", names=names)
    assert caught.value.message == (
        "birds has 10 samples in 10 classes: the smallest, k0, has 1; too few to put 1 and 1 aside and keep"
        " one of each class to train on"
    )
    assert "bring validation and test sets of your own" in caught.value.hint
    with pytest.raises(
        DataError, match=r"5 samples in 4 classes: the smallest, class 1, has 1; too few to put 2 and 1 aside"
    ):
        carve(torch.tensor([0, 0, 1, 2, 3]), (2, 1), 0, what="x", names=("0", "1", "2", "3"))


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
    have = torch.bincount(torch.cat([part.labels for part in (data.train, data.val, data.test)]))
    for part, size in ((data.val, 200), (data.test, 300)):
        assert (torch.bincount(part.labels) - have * size / 1797).abs().max() < 2
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


@pytest.mark.parametrize(("labels", "bad"), [([0, 1, -1], -1), ([0, 3, 1], 3), ([1, 2, 4], 4)])
def test_labels_out_of_range_are_named(labels: list[int], bad: int) -> None:
    with pytest.raises(DataError, match=rf"first is {bad} \(sample .*expected 0\.\.2"):
        check_labels(torch.tensor(labels), 3, what="things")


def test_labels_from_one_are_told_from_those_that_are_wrong() -> None:
    with pytest.raises(DataError, match=r"things: labels go from 1 to 3, expected 0 to 2") as caught:
        check_labels(torch.tensor([3, 1, 2, 2]), 3, what="things")
    assert caught.value.hint == "subtract 1 (for example target_transform=lambda y: y - 1)"
    with pytest.raises(DataError, match=r"things: labels go from 1 to 3, expected 0 to 2") as caught:
        check_zero_used(torch.tensor([3, 1, 2, 2]), what="things")
    assert "`num_classes` (= 4)" in caught.value.hint
    for fine in ([1, 3], [2, 3], [0, 1], [1, 1]):  # gaps, or one class only, which is told of elsewhere
        check_zero_used(torch.tensor(fine), what="things")


def test_an_empty_set_and_a_single_class_are_refused() -> None:
    with pytest.raises(DataError, match="things is empty"):
        check_labels(torch.empty(0, dtype=torch.int64), 3, what="things")
    with pytest.raises(DataError, match="one class only: every one of its 2 labels is class 2"):
        check_classes(torch.tensor([2, 2]), what="things")
    with pytest.raises(DataError, match="every one of its 2 labels is dogs"):
        check_classes(torch.tensor([1, 1]), what="things", names=("cats", "dogs"))


def test_a_limit_below_the_number_of_classes_is_refused_with_both_and_what_was_given() -> None:
    for limit in (1, 9):
        with pytest.raises(DataError, match=f"a train limit of {limit} leaves some of the 10 classes of digits, which "
                                            "has 1797 samples") as caught:  # fmt: skip
            load_data("digits", train_limit=limit)
        assert caught.value.hint == "raise the train limit to 10 or more"
    assert torch.bincount(load_data("digits", train_limit=10).train.labels).tolist() == [1] * 10


@pytest.mark.parametrize(
    ("of_class", "told"),
    [
        ((10, 29, 12), ""),
        ((10, 30, 12), "10 to 30 samples a class (smallest cats, largest dogs;"),
        ((4, 2, 0), "0 to 4 samples a class (smallest class 2, largest cats;"),
    ],
)
def test_classes_of_uneven_sizes_are_told_of(of_class: tuple[int, ...], told: str) -> None:
    labels = torch.arange(3).repeat_interleave(torch.tensor(of_class))
    described = Asked("x").describe((3, 8, 8), (len(labels), 5, 5), ("cats", "dogs", "2"), labels, "pictures")
    uneven = f"; {told} --balance draws all classes equally often)" if told else ""
    assert described == f"pictures: {len(labels)} train / 5 val / 5 test; 3 classes; 3x8x8{uneven}"
