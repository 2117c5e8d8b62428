"""Made-up images for benchmarks: of any size, the same for the same seed, and learnable."""

import math
import re
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ondevice_trgl.data.records import chunk_rows
from ondevice_trgl.data.source import Part, Source
from ondevice_trgl.errors import DataError
from ondevice_trgl.tasks import MULTI_LABEL, REGRESSION

FORM = "synthetic:CxHxW:CLASSES:N"
FORMS = (FORM, "synthetic:CxHxW:regT:N", "synthetic:CxHxW:multiT:N")
_SPEC = re.compile(r"synthetic:([0-9]+)x([0-9]+)x([0-9]+):(reg|multi)?([0-9]+):([0-9]+)")
_NOISE = 48.0
_UNIT = math.sqrt(12.0)
"""One over the spread of what is drawn evenly from 0 to 1."""
_MOST_TARGETS = 64
_PRIME = 1_000_003
_PATTERN_BYTES = 4 * 1024 * 1024
# Tensors up to this size are worked on by one thread: many small steps that wait for other threads took 20 times as
# long on a busy machine.
_SERIAL = 32768


def synthetic(spec: str, seed: int) -> Source:
    """`synthetic:CxHxW:CLASSES:N`: N training images; validation and test have a tenth of that each, and no fewer
    than one image a class, or than ten of other tasks.

    A class is a smooth random pattern, an image is the pattern of its class under noise. regT in place of CLASSES is
    regression, multiT multi-label, of T targets: an image is the sum of T patterns, each as strong as its target, which
    is drawn evenly with mean 0 and spread 1, or there or not. Raises DataError where the spec cannot be read.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise DataError(
            f"{spec!r} cannot be read; expected {' or '.join(FORMS)}", hint="for example synthetic:3x32x32:10:2000"
        )
    *sides, form, outputs, number = match.groups()
    channels, height, width, classes, count = map(int, (*sides, outputs, number))
    if min(channels, height, width, count) < 1 or classes < (1 if form else 2):
        raise DataError(
            f"{spec!r}: C, H, W, N and T must be at least 1, and CLASSES at least 2",
            hint="for example synthetic:3x32x32:10:2000",
        )
    if max(channels * height * width, classes) > 1 << 26 or count > 1 << 31:
        raise DataError(f"{spec!r} is too large", hint="at most 2^26 values an image, 2^26 classes and 2^31 images")
    shape = (channels, height, width)
    fewer = max(count // 10, 10 if form else classes)
    if form:
        return _of_targets(shape, REGRESSION if form == "reg" else MULTI_LABEL, classes, (count, fewer), seed)
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


def _of_targets(shape: tuple[int, int, int], task: str, outputs: int, counts: tuple[int, int], seed: int) -> Source:
    """See `synthetic`; `counts` of training images, and of each of the other two."""
    if outputs > _MOST_TARGETS:
        raise DataError(f"{outputs} targets are too many; expected at most {_MOST_TARGETS}")
    return Source(
        origin=f"synthetic images, each a sum of {outputs} noisy patterns, seed {seed}",
        shape=shape,
        class_names=tuple(map(str, range(outputs))),
        train=_summed(shape, task, outputs, counts[0], seed, part=0),
        val=lambda: _summed(shape, task, outputs, counts[1], seed, part=1),
        test=lambda: _summed(shape, task, outputs, counts[1], seed, part=2),
        task=task,
    )


def _summed(shape: tuple[int, int, int], task: str, outputs: int, count: int, seed: int, *, part: int) -> Part:
    targets = torch.rand(count, outputs, generator=_generator(seed, part, 0))
    targets = (targets - 0.5) * _UNIT if task == REGRESSION else targets.round_()

    def stream() -> Iterator[Tensor]:
        values = shape[0] * shape[1] * shape[2]
        patterns = torch.stack([_pattern(shape, label, seed) for label in range(outputs)]).float().sub_(127.5)
        patterns *= 1.0 / math.sqrt(outputs)
        for index, own in enumerate(targets, 1):
            noise = torch.randn(values, generator=_generator(seed, part, index)).mul_(_NOISE / 4)
            yield noise.add_(own @ patterns).add_(127.5).clamp_(0, 255).to(torch.uint8)[None]

    return Part(targets, stream)


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
