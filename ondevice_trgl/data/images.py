"""Labelled images as the trainer reads them: a map-style dataset with a batched path that allocates next to nothing."""

import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from ondevice_trgl.data.records import Records, chunk_rows
from ondevice_trgl.errors import DataError
from ondevice_trgl.tasks import CLASSES

_WORK_BYTES = 1024 * 1024


class ImageSet(Dataset[tuple[Tensor, int | Tensor]]):
    """Base of the datasets here: `labels`, `shape` of one input, `read` for whole batches.

    `labels` are class numbers, int64 (N,), or targets, float32 (N, T). `set[i]` gives (float32 tensor of `shape`, int
    label or targets (T,)), read through the same path as a batch.
    """

    task: str = CLASSES
    """What the labels are: classes, regression or multi-label."""

    whole: tuple[int, int] | None = None
    """Lowest and highest number in the inputs, where all are whole: ids, as far as a network looks them up."""

    class_names: tuple[str, ...] | None = None
    """Where the dataset states them; of targets the names of those."""

    def __init__(self, labels: Tensor, shape: tuple[int, ...]) -> None:
        self.labels = labels
        self.shape = shape

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        out = torch.empty(1, *self.shape)
        return out[0], one_label(self.read([index], out))

    def __iter__(self) -> Iterator[tuple[Tensor, int | Tensor]]:
        return (self[index] for index in range(len(self)))

    def read(self, indices: Sequence[int], out: Tensor) -> Tensor:
        """Fill `out[:len(indices)]` with those inputs and return their labels, as those of the set.

        `out` is float32 (at least len(indices), *shape), on any device; or int64, where inputs are whole numbers, which
        then come as they are. Safe to call from several threads.
        Raises IndexError and ValueError where the arguments do not fit.
        """
        wanted = [int(index) for index in indices]
        if wanted and (min(wanted) < 0 or max(wanted) >= len(self)):
            bad = next(index for index in wanted if not 0 <= index < len(self))
            raise IndexError(f"index {bad} is not in 0..{len(self) - 1}")
        fits = out.dtype == torch.float32 or (out.dtype == torch.int64 and self.whole is not None)
        if not fits or tuple(out.shape[1:]) != self.shape or len(out) < len(wanted):
            raise ValueError(
                f"out is {out.dtype} {tuple(out.shape)}; expected torch.float32 of at least"
                f" {(len(wanted), *self.shape)}"
            )
        return self._fill(wanted, out[: len(wanted)])

    @abstractmethod
    def _fill(self, indices: list[int], out: Tensor) -> Tensor:
        """Fill `out`, which has as many rows as `indices`, which are valid; their labels."""


def one_label(labels: Tensor) -> int | Tensor:
    """Of a batch of one sample: the number of its class, or its targets (T,)."""
    return labels[0] if labels.is_floating_point() else int(labels[0])


@dataclass(frozen=True)
class PixelStats:
    """Mean and standard deviation of each channel, of pixels from 0 to 255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    constant: bool = field(default=False, repr=False)
    """No channel has more than one level."""

    def over(self, channels: int) -> "PixelStats":
        """Those of a single channel, repeated as the channel is; of more, as they are."""
        repeat = channels if len(self.mean) == 1 else 1
        return PixelStats(self.mean * repeat, self.std * repeat)

    def stored(self, channels: int) -> "PixelStats":
        """The inverse of `over`: those of the one channel that was repeated; of pictures with more, as they are."""
        repeated = channels == 1 and len({*zip(self.mean, self.std, strict=True)}) == 1
        return PixelStats(self.mean[:1], self.std[:1]) if repeated else self


class StoredSet(ImageSet):
    """Images kept as uint8 records: read, resized (bilinear, no antialiasing), normalised, straight into `out`.

    `slots` (int64) says where in `records` each sample lies; `stored` is the C x H x W of a record, `shape` what is
    delivered: one channel may be repeated, height and width may differ. Memory: `_WORK_BYTES` or one image.
    """

    def __init__(
        self,
        records: Records,
        slots: Tensor,
        labels: Tensor,
        *,
        stored: tuple[int, int, int],
        shape: tuple[int, int, int],
        stats: PixelStats,
    ) -> None:
        super().__init__(labels, shape)
        self._records, self._slots, self._stored = records, slots, stored
        self._mean = torch.tensor(stats.mean).view(-1, 1, 1)
        self._std = torch.tensor(stats.std).view(-1, 1, 1)
        self._resizes = stored[1:] != shape[1:]
        pixels = stored[0] * max(stored[1] * stored[2], shape[1] * shape[2])
        self._rows = chunk_rows(4 * pixels, _WORK_BYTES)
        self._bytes: Tensor | None = None
        self._floats: Tensor | None = None
        self._lock = threading.Lock()

    def _fill(self, indices: list[int], out: Tensor) -> Tensor:
        with self._lock:
            for start in range(0, len(indices), self._rows):
                self._fill_chunk(indices[start : start + self._rows], out[start : start + self._rows])
        return self.labels[indices]

    def _fill_chunk(self, indices: list[int], out: Tensor) -> None:
        rows = len(indices)
        if self._bytes is None or len(self._bytes) < rows:
            self._bytes = torch.empty(rows, *self._stored, dtype=torch.uint8)
            self._floats = torch.empty(rows, *self._stored) if self._resizes else None
        raw = self._bytes[:rows]
        self._records.read(self._slots[indices].tolist(), raw.view(rows, -1))
        if self._floats is None:
            out.copy_(raw)  # repeats a single channel
        else:
            floats = self._floats[:rows].copy_(raw)
            out.copy_(interpolate(floats, size=self.shape[1:], mode="bilinear", align_corners=False, antialias=False))
        out.sub_(self._mean.to(out.device)).div_(self._std.to(out.device))


def all_alike(what: str, count: int, *levels: float, kind: str = "pixel") -> DataError:
    """The refusal of `count` training samples of which every pixel, in each channel, is that one level."""
    level = f"{levels[0]:g}" if len(set(levels)) == 1 else ", ".join(f"{level:g}" for level in levels)
    return DataError(
        f"every {kind} of the {count} training samples of {what} is {level}: there is nothing to learn from",
        hint="look at what they are made from, and at how they are read and scaled",
    )


def pixel_stats(records: Records, slots: Tensor, stored: tuple[int, int, int]) -> PixelStats:
    """Mean and standard deviation a channel of those records, in one streaming pass over exact counts.

    A channel that never changes gets a deviation of 1, so that normalising it gives zero.
    """
    channels, pixels = stored[0], stored[1] * stored[2]
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    ordered = slots.sort().values
    buffer = torch.empty(min(chunk_rows(channels * pixels), len(slots)), channels, pixels, dtype=torch.uint8)
    for piece in torch.split(ordered, len(buffer)):
        raw = buffer[: len(piece)]
        records.read(piece.tolist(), raw.view(len(piece), -1))
        for channel in range(channels):
            counts[channel] += torch.bincount(raw[:, channel].reshape(-1), minlength=256)
    values, share = torch.arange(256, dtype=torch.float64), counts.double() / (len(slots) * pixels)
    mean = share @ values
    std = (share * (values - mean[:, None]) ** 2).sum(1).sqrt()
    varied = std > 0
    std = torch.where(varied, std, torch.ones_like(std))
    return PixelStats(tuple(mean.tolist()), tuple(std.tolist()), constant=not bool(varied.any()))
