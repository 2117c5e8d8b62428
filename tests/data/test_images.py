"""Reading: the batched path against the plain formula, its arguments, and records in memory and in a file."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import interpolate

from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.data import records as records_module
from ondevice_trgl.data.images import PixelStats, StoredSet, pixel_stats
from ondevice_trgl.data.records import FileRecords, MemoryRecords, keep_records, stream_file
from ondevice_trgl.data.registry import load_data
from ondevice_trgl.errors import DataError, StorageError


def stored_set(raw: Tensor, shape: tuple[int, int, int]) -> StoredSet:
    count, *stored = raw.shape
    kept = MemoryRecords(raw.view(count, -1))
    size = (stored[0], stored[1], stored[2])
    stats = pixel_stats(kept, torch.arange(count), size)
    return StoredSet(kept, torch.arange(count), torch.arange(count) % 3, stored=size, shape=shape, stats=stats)


def plainly(raw: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """What `read` promises, in one line each, over the whole set in float64."""
    values = raw.double()
    mean = values.mean((0, 2, 3)).view(-1, 1, 1)
    std = values.std((0, 2, 3), correction=0).view(-1, 1, 1)
    std = torch.where(std > 0, std, 1.0)
    if raw.shape[2:] != shape[1:]:
        values = interpolate(values, size=shape[1:], mode="bilinear", align_corners=False, antialias=False)
    return ((values - mean) / std).expand(-1, *shape).float()


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 12),
    channels=st.sampled_from([(1, 1), (1, 3), (3, 3)]),
    sizes=st.tuples(*[st.integers(1, 20)] * 4),
    seed=st.integers(0, 1000),
)
def test_read_is_resize_then_normalise(
    count: int, channels: tuple[int, int], sizes: tuple[int, int, int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (count, channels[0], *sizes[:2]), dtype=torch.uint8, generator=generator)
    shape = (channels[1], *sizes[2:])
    images = stored_set(raw, shape)
    out = torch.full((count + 1, *shape), torch.nan)
    order = torch.randperm(count, generator=generator).tolist()
    labels = images.read(order, out)
    torch.testing.assert_close(out[:count], plainly(raw, shape)[order], atol=2e-4, rtol=1e-4)
    assert out[count:].isnan().all(), "rows past the batch must stay as they were"
    assert labels.tolist() == [index % 3 for index in order]


def test_read_of_a_batch_equals_single_samples_bit_for_bit() -> None:
    data = load_data("digits", image_size=19, channels=3)
    out = torch.empty(50, 3, 19, 19)
    labels = data.train.read(range(10, 60), out)
    for row, index in enumerate(range(10, 60)):
        image, label = data.train[index]
        assert torch.equal(image, out[row])
        assert label == labels[row]


def test_large_images_are_read_in_several_chunks() -> None:
    raw = torch.randint(0, 256, (7, 1, 300, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = stored_set(raw, (1, 200, 200))
    assert images._rows < 7
    out = torch.empty(7, 1, 200, 200)
    images.read(range(7), out)
    torch.testing.assert_close(out, plainly(raw, (1, 200, 200)), atol=2e-4, rtol=1e-4)


def test_the_train_split_has_zero_mean_and_unit_deviation() -> None:
    data = load_data("digits")
    out = torch.empty(len(data.train), 1, 8, 8)
    data.train.read(range(len(data.train)), out)
    assert abs(out.mean().item()) < 1e-5
    assert abs(out.std().item() - 1) < 1e-3


def test_a_constant_channel_becomes_zero() -> None:
    raw = torch.stack([torch.full((4, 5, 5), 9), torch.arange(100).view(4, 5, 5)], 1).to(torch.uint8)
    out = torch.empty(4, 2, 5, 5)
    stored_set(raw, (2, 5, 5)).read(range(4), out)
    assert (out[:, 0] == 0).all()


@pytest.mark.parametrize("index", [-1, 1297])
def test_an_index_outside_is_refused(index: int) -> None:
    data = load_data("digits")
    with pytest.raises(IndexError, match=r"0\.\.1296"):
        data.train.read([0, index], torch.empty(2, 1, 8, 8))
    with pytest.raises(IndexError):
        data.train[index]


@pytest.mark.parametrize(
    "out",
    [torch.empty(1, 1, 8, 8), torch.empty(2, 3, 8, 8), torch.empty(2, 1, 8, 8, dtype=torch.float64)],
    ids=["too-few-rows", "channels", "dtype"],
)
def test_an_output_that_does_not_fit_is_refused(out: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected torch\.float32"):
        load_data("digits").train.read([0, 1], out)


def test_reading_nothing_gives_no_labels() -> None:
    assert load_data("digits").train.read([], torch.empty(0, 1, 8, 8)).shape == (0,)


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 40),
    size=st.integers(1, 9),
    rows=st.integers(1, 11),
    data=st.data(),
)
def test_file_and_memory_keep_the_same_records(count: int, size: int, rows: int, data: st.DataObject) -> None:
    raw = torch.randint(0, 256, (count, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    wanted = torch.tensor(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))))
    slots = data.draw(st.lists(st.integers(0, len(wanted) - 1), min_size=1, max_size=50))
    with pytest.MonkeyPatch.context() as patch:
        kept = [keep_records(torch.split(raw, rows), wanted, size)]
        patch.setattr(records_module, "IN_MEMORY_BYTES", 0)
        kept.append(keep_records(torch.split(raw, rows), wanted, size))
    assert [type(store) for store in kept] == [MemoryRecords, FileRecords]
    for store in kept:
        out = torch.empty(len(slots), size, dtype=torch.uint8)
        store.read(slots, out)
        assert torch.equal(out, raw[wanted][slots])


def test_more_than_8_mb_go_to_a_file_without_a_name(tmp_path: Path) -> None:
    raw = torch.zeros(90, 100_000, dtype=torch.uint8)
    scratch = tmp_path / "made" / "here"
    store = keep_records(torch.split(raw, 7), torch.arange(90), 100_000, scratch_dir=scratch)
    assert isinstance(store, FileRecords)
    assert list(scratch.iterdir()) == []


def test_a_scratch_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    raw = torch.zeros(90, 100_000, dtype=torch.uint8)
    with pytest.raises(StorageError, match=r"cannot write to .*file"):
        keep_records([raw], torch.arange(90), 100_000, scratch_dir=tmp_path / "file")


def test_a_full_disk_is_a_storage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    monkeypatch.setattr(records_module, "open_scratch", lambda _: full.open("wb", buffering=0))
    raw = torch.zeros(90, 100_000, dtype=torch.uint8)
    with pytest.raises(StorageError, match=r"9000000 bytes .*No space left"):
        keep_records([raw], torch.arange(90), 100_000)


def test_a_scratch_file_cut_short_is_a_storage_error(tmp_path: Path) -> None:
    file = (tmp_path / "records").open("w+b")
    file.write(bytes(10))
    file.flush()
    with pytest.raises(StorageError, match="shorter"):
        FileRecords(file, 4).read([2], torch.empty(1, 4, dtype=torch.uint8))


def test_a_stream_that_ends_early_names_the_record(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_bytes(bytes(10))
    with path.open("rb") as file, pytest.raises(DataError, match=r"things is truncated: 3 records .* in record 2"):
        list(stream_file(file, 3, 4, what="things"))


def test_bytes_of_refuses_scattered_memory_and_keeps_the_tensor_alive() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        bytes_of(torch.zeros(4, 4)[:, 1:])
    view = bytes_of(torch.arange(100_000, dtype=torch.uint8))
    torch.zeros(100_000, dtype=torch.uint8)
    assert view[99] == 99


def test_several_threads_read_without_mixing() -> None:
    from concurrent.futures import ThreadPoolExecutor

    data = load_data("digits", image_size=16)
    expected = torch.empty(len(data.train), 1, 16, 16)
    data.train.read(range(len(data.train)), expected)

    def read(start: int) -> bool:
        out = torch.empty(40, 1, 16, 16)
        return all(
            bool(data.train.read(range(start + 40 * i, start + 40 * i + 40), out) is not None)
            and torch.equal(out, expected[start + 40 * i : start + 40 * i + 40])
            for i in range(10)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, [0, 100, 400, 800]))


def test_stats_are_counted_for_each_channel() -> None:
    raw = torch.tensor([0, 10, 20, 30], dtype=torch.uint8).view(2, 2, 1, 1)
    stats = pixel_stats(MemoryRecords(raw.view(2, 2)), torch.tensor([1, 0]), (2, 1, 1))
    assert stats == PixelStats((10.0, 20.0), (10.0, 10.0))
