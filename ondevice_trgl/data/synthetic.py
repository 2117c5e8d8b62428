"""Made-up images for benchmarks: of any size, the same for the same seed, and learnable."""

import re
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ondevice_trgl.data.records import chunk_rows
from ondevice_trgl.data.source import Part, Source
from ondevice_trgl.errors import DataError

FORM = "synthetic:CxHxW:CLASSES:N"
_SPEC = re.compile(r"synthetic:([0-9]+)x([0-9]+)x([0-9]+):([0-9]+):([0-9]+)")
_NOISE = 48.0
_PRIME = 1_000_003
_PATTERN_BYTES = 4 * 1024 * 1024
# Tensors up to this size are worked on by one thread: many small steps that wait for other threads took 20 times as
# long on a busy machine.
_SERIAL = 32768


def synthetic(spec: str, seed: int) -> Source:
    """`synthetic:CxHxW:CLASSES:N`: N training images; validation and test have a tenth of that each, and no fewer
    than one image a class.

    A class is a smooth random pattern, an image is the pattern of its class under noise. Raises DataError where the
    spec cannot be read.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise DataError(f"{spec!r} cannot be read; expected {FORM}", hint="for example synthetic:3x32x32:10:2000")
    channels, height, width, classes, count = map(int, match.groups())
    if min(channels, height, width, count) < 1 or classes < 2:
        raise DataError(
            f"{spec!r}: C, H, W and N must be at least 1, and CLASSES at least 2",
            hint="for example synthetic:3x32x32:10:2000",
        )
    if max(channels * height * width, classes) > 1 << 26 or count > 1 << 31:
        raise DataError(f"{spec!r} is too large", hint="at most 2^26 values an image, 2^26 classes and 2^31 images")
    shape = (channels, height, width)
    fewer = max(count // 10, classes)
    return Source(
        origin=f"synthetic images of {classes} noisy patterns, seed {seed}",
        shape=shape,
        class_names=tuple(map(str, range(classes))),
        train=_part(shape, classes, count, seed, part=0),
        val=lambda: _part(shape, classes, fewer, seed, part=1),
        test=lambda: _part(shape, classes, fewer, seed, part=2),
    )


def _generator(seed: int, part: int, chunk: int) -> torch.Generator:
    return torch.Generator().manual_seed(((seed * 4 + part) * _PRIME + chunk) % (1 << 63))


def _part(shape: tuple[int, int, int], classes: int, count: int, seed: int, *, part: int) -> Part:
    order = torch.randperm(count, generator=_generator(seed, part, 0))
    labels = order % classes

    def stream() -> Iterator[Tensor]:
        values = shape[0] * shape[1] * shape[2]
        pattern = lru_cache(maxsize=chunk_rows(values, _PATTERN_BYTES))(lambda label: _pattern(shape, label, seed))
        record = torch.empty(1, values, dtype=torch.uint8)
        for index, label in enumerate(labels.tolist(), 1):
            noise = torch.randn(values, generator=_generator(seed, part, index))
            for some, base, target in zip(
                *(torch.split(whole, _SERIAL) for whole in (noise, pattern(label), record[0])), strict=True
            ):
                target.copy_(some.mul_(_NOISE).add_(base).clamp_(0, 255))
            yield record

    return Part(labels, stream)


def _pattern(shape: tuple[int, int, int], label: int, seed: int) -> Tensor:
    """The pattern of a class: 4x4 random patches, blurred to H x W; uint8 (C*H*W,)."""
    coarse = torch.rand(1, shape[0], 4, 4, generator=_generator(seed, 3, label)).mul_(255)
    return interpolate(coarse, size=shape[1:], mode="bilinear", align_corners=False).to(torch.uint8).view(-1)
