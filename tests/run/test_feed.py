"""What a module trains on: the same samples by every way, and none overwritten that is still in use or on its way."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ondevice_trgl.cache.memory import MemoryCache
from ondevice_trgl.run.feed import Feed, Lane
from ondevice_trgl.run.relay import Relay

CPU = torch.device("cpu")
SHAPE = (2, 3)


class Data:
    def __init__(self, rows: int = 40) -> None:
        self.values = torch.arange(rows * 6, dtype=torch.float32).view(rows, *SHAPE)
        self.labels = torch.arange(rows)
        self.shape: tuple[int, ...] = SHAPE
        self.reads: list[list[int]] = []

    def read(self, indices: Sequence[int], out: Tensor) -> Tensor:
        self.reads.append(list(indices))
        out[: len(indices)] = self.values[list(indices)]
        return self.labels[list(indices)]


class Late(Lane):
    """A copy that only happens when it has to: what is read or overwritten too early shows."""

    def __init__(self, log: list[str], name: str, *, clears: bool = True) -> None:
        self._log, self._name, self._clears = log, name, clears
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._used = False

    def wait_until_read(self) -> None:
        self._happen()

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        assert not self._used, "copied over what is in use"
        self._log.append(f"copy {self._name}")
        self._waiting = list(pairs)

    def arrive(self) -> None:
        self._happen()
        self._used = True
        self._log.append(f"compute {self._name}")

    def leave(self) -> None:
        self._used = False

    def _happen(self) -> None:
        for host, device in self._waiting:
            device.copy_(host)
            if self._clears:
                host.fill_(-1.0)
        self._waiting = []


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def feed(log: list[str]) -> Feed:
    return Feed(4, SHAPE, torch.float32, CPU, [Late(log, "a"), Late(log, "b")])


def steps(feed: Feed, data: Data, *batches: Sequence[int], ahead: bool = True) -> list[tuple[Tensor, Tensor]]:
    found = []
    for number, batch in enumerate(batches):
        following = batches[number + 1] if ahead and number + 1 < len(batches) else ()
        found += [(z.clone(), labels.clone()) for z, labels in feed.micro_batches(data, batch, following)]
    return found


@pytest.mark.parametrize("ahead", [True, False])
def test_every_sample_arrives_in_order(feed: Feed, ahead: bool) -> None:
    data = Data()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    batches = [order[at : at + 8] for at in range(0, 40, 8)]
    found = steps(feed, data, *batches, ahead=ahead)
    plain = steps(Feed(4, SHAPE, torch.float32, CPU), data, *batches)
    assert len(found) == len(plain) == 10
    for (z, labels), (expected, expected_labels) in zip(found, plain, strict=True):
        assert torch.equal(z, expected)
        assert torch.equal(labels, expected_labels)
    assert torch.equal(torch.cat([labels for _, labels in found]), torch.tensor(order))


def test_the_next_micro_batch_is_on_its_way_while_one_is_computed(feed: Feed, log: list[str]) -> None:
    data = Data()
    steps(feed, data, range(8), range(8, 16))
    assert log == [
        "copy a", "compute a", "copy b", "compute b", "copy a", "compute a", "copy b", "compute b",
    ]  # fmt: skip
    assert data.reads == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]], "each is read once"


def test_what_was_read_ahead_and_is_not_asked_for_is_forgotten(feed: Feed) -> None:
    data = Data()
    list(feed.micro_batches(data, range(4), range(4, 8)))
    ((z, labels),) = feed.micro_batches(data, range(20, 24))
    assert labels.tolist() == [20, 21, 22, 23]
    assert torch.equal(z, data.values[20:24])
    other = Data()
    other.values += 0.5
    list(feed.micro_batches(data, range(4), range(4, 8)))
    ((z, _),) = feed.micro_batches(other, range(4, 8))
    assert torch.equal(z, other.values[4:8]), "of another source"


def test_a_step_that_failed_in_the_middle_is_done_again_from_the_start(feed: Feed) -> None:
    data = Data()
    for _ in range(3):
        for z, _ in feed.micro_batches(data, range(8), range(8, 16)):
            assert torch.equal(z, data.values[:4])
            break  # memory ran short
    found = steps(feed, data, range(8))
    assert torch.equal(torch.cat([z for z, _ in found]), data.values[:8])


def test_one_that_is_on_the_device_is_not_read_ahead(feed: Feed, log: list[str]) -> None:
    relay = Relay(8, [SHAPE, SHAPE], CPU)
    relay.begin(torch.arange(8), SHAPE)
    values = torch.randn(8, *SHAPE)
    relay.rewound()(values)
    relay.advance(SHAPE)
    found = [(z.clone(), labels) for z, labels in feed.micro_batches(relay, range(8), range(8))]
    assert torch.equal(torch.cat([z for z, _ in found]), values)
    assert torch.equal(torch.cat([labels for _, labels in found]), torch.arange(8))
    assert log == ["compute a", "compute b"]


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where memory is pinned: stands in for CUDA."""
    where: list[int] = []
    monkeypatch.setattr("ondevice_trgl.device.pinned.pin", lambda block: where.append(block.data_ptr()))
    monkeypatch.setattr("ondevice_trgl.device.pinned.unpin", lambda block: where.remove(block.data_ptr()))
    return where


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_rows_that_are_pinned_go_to_the_gpu_from_where_they_lie(pinned: list[int], log: list[str], dtype: str) -> None:
    data = Data()
    feed = Feed(4, SHAPE, torch.float32, CPU, [Late(log, name, clears=dtype != "fp32") for name in "ab"])
    with MemoryCache(40, SHAPE, dtype, for_gpu=True) as cache:
        assert len(pinned) == 1
        for start in range(0, 40, 8):
            cache.append(data.values[start : start + 8], data.labels[start : start + 8])
        order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
        read = torch.empty(40, *SHAPE)
        assert torch.equal(cache.read(order, read), torch.tensor(order))
        before = cache.bytes_read
        found = [(z.clone(), labels) for z, labels in feed.micro_batches(cache, order)]
        assert cache.bytes_read - before == 40 * cache.row_bytes
        assert torch.equal(torch.cat([z for z, _ in found]), read)
        assert torch.equal(torch.cat([labels for _, labels in found]), torch.tensor(order))
        assert (cache.views(order) is not None) == (dtype == "fp32")
    assert pinned == []
