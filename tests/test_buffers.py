"""A tensor's memory as bytes, without a copy."""

import gc

import pytest
import torch

from ondevice_trgl.buffers import bytes_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_writing_the_bytes_writes_the_tensor(dtype: torch.dtype) -> None:
    source, target = torch.ones(3, 2, dtype=dtype), torch.zeros(3, 2, dtype=dtype)
    bytes_of(target)[:] = bytes_of(source)
    assert torch.equal(source, target)
    assert len(bytes_of(target)) == target.numel() * target.element_size()


def test_the_bytes_keep_the_tensor_alive() -> None:
    view = bytes_of(torch.full((1000,), 7, dtype=torch.uint8))
    gc.collect()
    torch.full((1000,), 9, dtype=torch.uint8)
    assert view == b"\x07" * 1000


def test_a_slice_of_rows_starts_where_it_starts() -> None:
    assert bytes_of(torch.arange(6, dtype=torch.uint8).reshape(3, 2)[1:]).tolist() == [2, 3, 4, 5]


def test_scalars_and_empty_tensors() -> None:
    assert bytes_of(torch.tensor(5, dtype=torch.uint8)).tolist() == [5]
    assert len(bytes_of(torch.empty(0, 4))) == 0


@pytest.mark.parametrize("tensor", [torch.zeros(4, 4).t()[:2], torch.zeros(3, device="meta")])
def test_gaps_and_other_devices_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected a contiguous CPU tensor"):
        bytes_of(tensor)
