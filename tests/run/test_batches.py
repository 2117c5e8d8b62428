"""Every row once, in batches of one shape, in an order that the key alone decides."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ondevice_trgl import DataError, NonFiniteError, TrainConfig
from ondevice_trgl.run.batches import (
    all_rows,
    buffer_for,
    check_finite,
    check_labels,
    epoch_order,
    mix,
    shuffled,
    shuffled_by_chunk,
    train_batches,
)
from ondevice_trgl.run.boundaries import Boundaries

KEYS = st.lists(st.integers(0, 2**40), min_size=1, max_size=5)


class Rows:
    """Row i holds i, and so does its label."""

    def __init__(self, count: int) -> None:
        self.labels = torch.arange(count)
        self.shape: tuple[int, ...] = (2,)

    def read(self, indices: Sequence[int], out: Tensor) -> Tensor:
        chosen = torch.tensor(list(indices), dtype=torch.int64)
        out[: len(chosen)] = chosen[:, None].float()
        return chosen


@given(rows=st.integers(1, 60), key=KEYS)
def test_an_order_is_a_permutation_that_repeats(rows: int, key: list[int]) -> None:
    order = shuffled(rows, *key)
    assert sorted(order) == list(range(rows))
    assert shuffled(rows, *key) == order


def test_neighbouring_keys_give_unrelated_orders() -> None:
    orders = {tuple(shuffled(50, seed, lap, module)) for seed in range(4) for lap in range(4) for module in range(4)}
    assert len(orders) == 64


@given(key=KEYS)
def test_a_seed_is_one_that_torch_takes(key: list[int]) -> None:
    assert 0 <= mix(*key) < 2**63
    assert mix(*key) != mix(*key, 0)


def test_an_order_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    shuffled(10, 1)
    assert torch.equal(torch.get_rng_state(), before)


OF_CLASS = st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any)


def labels_of(of_class: list[int]) -> Tensor:
    labels = torch.arange(len(of_class)).repeat_interleave(torch.tensor(of_class))
    return labels[torch.tensor(shuffled(len(labels), 5), dtype=torch.int64)]


@given(rows=st.integers(1, 60), key=KEYS, epoch=st.integers(0, 5))
def test_without_balance_every_sample_comes_once_an_epoch(rows: int, key: list[int], epoch: int) -> None:
    labels = torch.arange(rows) % 3
    assert epoch_order(labels, *key, epoch=epoch, balance=False) == shuffled(rows, *key, epoch)


@given(of_class=OF_CLASS, key=KEYS)
def test_with_balance_classes_come_equally_often_and_no_sample_before_all_of_its_class(
    of_class: list[int], key: list[int]
) -> None:
    labels, present = labels_of(of_class), [index for index, have in enumerate(of_class) if have]
    drawn: dict[int, list[int]] = {index: [] for index in present}
    for epoch in range(6):
        order = epoch_order(labels, *key, epoch=epoch, balance=True)
        assert len(order) == len(labels)
        assert order == epoch_order(labels, *key, epoch=epoch, balance=True)
        often = torch.bincount(labels[order], minlength=len(of_class))[present]
        assert int(often.max() - often.min()) <= 1
        for index in order:
            drawn[int(labels[index])].append(index)
        so_far = [len(some) for some in drawn.values()]
        assert max(so_far) - min(so_far) <= 1, "the rest goes round"
    for index, some in drawn.items():
        for start in range(0, len(some), of_class[index]):
            lap = some[start : start + of_class[index]]
            assert len(set(lap)) == len(lap), "a sample came again before all others of its class"


def test_with_balance_nine_to_one_becomes_one_to_one_in_every_batch() -> None:
    labels = labels_of([90, 10])
    order = torch.tensor(epoch_order(labels, 1, epoch=0, balance=True))
    assert torch.bincount(labels[order]).tolist() == [50, 50]
    assert [torch.bincount(labels[batch]).tolist() for batch in order.split(10)] == [[5, 5]] * 10
    small = order[labels[order] == 1].split(10)
    assert [sorted(lap.tolist()) for lap in small] == [(labels == 1).nonzero().flatten().tolist()] * 5
    assert len({tuple(lap.tolist()) for lap in small}) == 5, "each time in another order"
    orders = {tuple(epoch_order(labels, seed, epoch=epoch, balance=True)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(rows=st.integers(1, 40), micro=st.integers(1, 5), count=st.integers(1, 4))
def test_training_takes_full_batches_alone(rows: int, micro: int, count: int) -> None:
    batch, order = micro * count, shuffled(rows, 7)
    buffer = buffer_for(micro, (2,), torch.float32)
    seen: list[int] = []
    batches = 0
    for micro_batches in train_batches(Rows(rows), order, batch, buffer):
        batches += 1
        for z, labels in micro_batches:
            assert z is buffer
            assert z[:, 0].tolist() == labels.tolist()
            seen += labels.tolist()
    assert batches == rows // batch
    assert seen == order[: batches * batch]


@given(rows=st.integers(1, 40), micro=st.integers(1, 9))
def test_a_sweep_meets_every_row_once(rows: int, micro: int) -> None:
    buffer = buffer_for(micro, (2,), torch.float32)
    seen: list[int] = []
    for z, labels, start, count in all_rows(Rows(rows), buffer):
        assert len(z) == micro
        assert start == len(seen)
        assert z[:count, 0].tolist() == labels.tolist()
        seen += labels.tolist()
    assert seen == list(range(rows))


@pytest.mark.parametrize(
    ("labels", "what", "message"),
    [
        ([], "val", "empty"),
        ([3, 1, 2], "val", "labels of the val set go from 1 to 3, expected 0 to 2"),
        ([0, 3], "val", "label 3 of val sample 1"),
        ([0, -2], "test", "label -2 of test sample 1"),
    ],
)
def test_bad_labels(labels: list[int], what: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_labels(torch.tensor(labels, dtype=torch.int64), 3, what)


def test_one_class_is_too_few_to_train_on_and_enough_to_test_on() -> None:
    with pytest.raises(DataError, match="nothing to learn"):
        check_labels(torch.tensor([2, 2]), 3, "train")
    with pytest.raises(DataError, match="all 2 train samples are of owl"):
        check_labels(torch.tensor([2, 2]), 3, "train", ("cat", "dog", "owl"))
    check_labels(torch.tensor([2, 2]), 3, "test")


def test_the_first_bad_sample_is_named_by_its_index() -> None:
    z = torch.zeros(4, 2)
    check_finite(z, [5, 6, 7, 8], "here")
    z[2, 1], z[3, 0] = float("-inf"), float("nan")
    with pytest.raises(NonFiniteError, match=r"infinity in here, sample 7\b"):
        check_finite(z, [5, 6, 7, 8], "here")
    check_finite(z, [5, 6], "rows behind the batch are padding")
    check_finite(torch.zeros(1, dtype=torch.int64), [0], "here")


@pytest.mark.parametrize("tier", ["disk", "memory"])
def test_a_boundary_gives_back_what_was_written_and_the_one_before_is_gone(tmp_path: Path, tier: str) -> None:
    boundaries = Boundaries({"train": Rows(5), "test": Rows(2)}, tier, "fp32", tmp_path)
    assert boundaries.splits == ("train", "test")
    for index in range(3):
        for split, rows in (("train", 5), ("test", 2)):
            for start in range(0, rows, 2):
                labels = torch.arange(start, min(start + 2, rows))
                boundaries.append(split, (3,), labels[:, None].expand(-1, 3) + 10.0 * index, labels)
        boundaries.advance()
        assert boundaries.index == index + 1
        out = torch.zeros(2, 3)
        assert boundaries.source("train").read([4, 1], out).tolist() == [4, 1]
        assert out[:, 2].tolist() == [4 + 10 * index, 1 + 10 * index]
        names = sorted(path.name for path in tmp_path.iterdir())
        files = [f"boundary-00{index + 1}-{split}.bin" for split in ("test", "train")]
        assert names == (files if tier == "disk" else [])
        assert boundaries.traffic() == (2 * 3 * 4, 0)
    boundaries.rewind()
    assert boundaries.index == 0
    assert list(tmp_path.iterdir()) == []


@given(st.integers(1, 3000), st.integers(1, 200), st.integers(0, 5))
def test_shuffled_by_chunk_is_a_permutation_that_depends_on_its_key_alone(rows: int, chunk: int, key: int) -> None:
    order = shuffled_by_chunk(rows, chunk, key, 1)
    assert sorted(order) == list(range(rows))
    assert order == shuffled_by_chunk(rows, chunk, key, 1)
    assert rows < 20 or order != shuffled_by_chunk(rows, chunk, key, 2)


def test_shuffled_by_chunk_has_few_chunks_in_use_at_a_time() -> None:
    chunk, chunks = 16, 200
    order = shuffled_by_chunk(chunk * chunks, chunk, 0)
    places: dict[int, list[int]] = {}
    for place, row in enumerate(order):
        places.setdefault(row // chunk, []).append(place)
    in_use = [sum(p[0] <= place <= p[-1] for p in places.values()) for place in range(0, len(order), 50)]
    assert max(in_use) <= 40
    assert statistics.mean(in_use[10:-10]) > 25  # and the samples of a batch are from many of them
    assert list(places) != sorted(places)


def test_a_cache_is_drawn_from_by_chunk_and_the_data_are_not(tmp_path: Path) -> None:
    data = {"train": Rows(600)}
    boundaries = Boundaries(data, "memory", "fp32", tmp_path, by_chunk=True)
    config = TrainConfig(shuffle="chunks", seed=3)
    assert boundaries.order(2, config, 0, 1) == shuffled(600, 3, 0, 1, 2)
    shape = 1 << 14, 4  # 256 KiB: four rows a chunk
    boundaries.append("train", shape, torch.zeros(600, 1, 1).expand(600, *shape), data["train"].labels)
    boundaries.advance()
    assert boundaries.order(2, config, 0, 1) == shuffled_by_chunk(600, 4, 3, 0, 1, 2)
