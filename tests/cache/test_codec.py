"""What is kept of a row, and what is lost."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ondevice_trgl.cache.codec import MOST_ERROR, Codec, codec_for, row_bytes
from ondevice_trgl.cache.disk import DiskCache
from ondevice_trgl.cache.memory import MemoryCache
from ondevice_trgl.run.boundaries import Boundaries

BITS = {"fp16": 11, "bf16": 8}


def again(codec: Codec, block: Tensor) -> Tensor:
    encoded, out = codec.encode(block), torch.empty_like(block)
    assert encoded.shape == (len(block), codec.row_bytes)
    codec.decode(encoded, out)
    one, wide = torch.empty_like(block[:1]), torch.empty_like(block, dtype=torch.float64)
    codec.decode(encoded[-1:], one)
    codec.decode(encoded, wide)
    assert torch.equal(one, out[-1:])
    assert torch.equal(wide.float(), out)
    return out


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        ("fp32", (3, 7, 7), 588),
        ("bf16", (3, 7, 7), 294),
        ("fp16", (5,), 10),
        ("int8", (3, 7, 7), 176),  # 3 channels of 49 values and 8 bytes, to the next 8
        ("int8", (64, 2, 2), 264),  # channels of 4 values: one pair of ends for all
        ("int8", (128,), 136),
        ("int8", (197, 768), 197 * 776),
    ],
)
def test_bytes_of_a_row(dtype: str, shape: tuple[int, ...], size: int) -> None:
    assert row_bytes(shape, dtype) == size
    assert Codec(dtype, shape).encode(torch.randn(2, *shape)).shape == (2, size)


@settings(max_examples=40)
@given(
    shape=st.sampled_from([(3, 5, 5), (4, 2, 2), (7,), (2, 16), (1, 1, 1)]),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 99),
)
def test_int8_is_off_by_half_a_step_of_its_group_at_most(
    shape: tuple[int, ...], scale: float, shift: float, seed: int
) -> None:
    block = scale * (torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed)) + shift)
    block[0, 0] = block[0].flatten()[0]  # a group, or a part of one, with a single value
    codec = Codec("int8", shape)
    groups = shape[0] if len(shape) > 1 and math.prod(shape[1:]) >= 16 else 1
    values = block.view(3, groups, -1)
    off = (again(codec, block).view(3, groups, -1) - values).abs().amax(2)
    assert bool((off <= (values.amax(2) - values.amin(2)) / 255 * 0.501 + 1e-6 * values.abs().amax(2)).all())


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8"])
def test_the_error_is_the_share_of_the_root_mean_square(dtype: str) -> None:
    row = torch.relu(torch.randn(8, 9, 9, generator=torch.Generator().manual_seed(1)))
    codec = Codec(dtype, (8, 9, 9))
    expected = ((again(codec, row.unsqueeze(0))[0] - row).norm() / row.norm()).item()
    assert codec.error(row) == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert codec.error(row) <= {"fp32": 0.0, "int8": 0.01}.get(dtype, 2.0 ** -BITS.get(dtype, 0))
    assert codec.error(torch.zeros(8, 9, 9)) == 0.0
    assert codec.error(torch.full((8, 9, 9), float("nan"))) == 0.0  # is told elsewhere, by name


def test_what_a_format_cannot_hold_is_kept_in_a_wider_one() -> None:
    normal, large = torch.randn(4, 3, 6, 6), 1e6 * torch.randn(4, 3, 6, 6)
    uneven = torch.randn(4, 300)  # one group of them all
    uneven[:, 0], uneven[:, 1] = 80.0, -80.0
    assert codec_for("int8", normal).dtype == codec_for("int8", large).dtype == "int8"
    assert codec_for("fp16", normal).dtype == "fp16"
    assert codec_for("fp16", large).dtype == "bf16"  # above 65 504 it is infinite
    assert Codec("fp16", (3, 6, 6)).error(large[0]) >= 1e9
    assert Codec("int8", (300,)).error(uneven[0]) > MOST_ERROR  # its steps are as large as most of its values
    assert codec_for("int8", uneven).dtype == "bf16"
    assert codec_for("fp32", large).dtype == "fp32"


@pytest.mark.parametrize("tier", ["memory", "disk"])
@pytest.mark.parametrize("shape", [(3, 7, 7), (5,)])
def test_caches_keep_int8_rows_and_tell_what_was_lost(tier: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    values = torch.randn(9, *shape)
    cache = DiskCache(tmp_path / "b", 9, shape, "int8") if tier == "disk" else MemoryCache(9, shape, "int8")
    with cache:
        cache.append(values[:4], torch.arange(4))
        cache.append(values[4:], torch.arange(4, 9))
        cache.seal()
        out = torch.empty(3, *shape)
        cache.read([8, 0, 3], out)
        assert torch.equal(out, again(Codec("int8", shape), values[[8, 0, 3]]))
        errors = [Codec("int8", shape).error(values[row]) for row in (0, 4)]
        assert cache.lost == max(errors) > 0
        assert cache.bytes_written == 9 * row_bytes(shape, "int8")


def test_every_split_is_kept_as_the_first_needs(tmp_path: Path) -> None:
    class Data:
        labels, shape = torch.arange(4), (3,)

    boundaries = Boundaries({"train": Data(), "val": Data()}, "disk", "fp16", tmp_path)  # type: ignore[dict-item]
    boundaries.append("train", (3,), torch.full((4, 3), 1e5), torch.arange(4))
    boundaries.append("val", (3,), torch.ones(4, 3), torch.arange(4))
    dtype, lost = boundaries.kept_as()
    assert (dtype, lost) == ("bf16", Codec("bf16", (3,)).error(torch.full((3,), 1e5)))
    boundaries.advance(producer="me")
    assert boundaries.source("val").dtype == "bf16"  # type: ignore[attr-defined]
    path = boundaries.path(1, "train")
    boundaries.close(keep=True)
    found = DiskCache.sealed(path, "me", (3,), "fp16", torch.arange(4))
    assert found is not None
    assert (found.dtype, found.damaged()) == ("bf16", [])
    found.close()
