"""Micro-batches on their way to the device: on a GPU, read and copied while it works on the one before."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ondevice_trgl.cache.base import BoundaryCache
from ondevice_trgl.run.batches import Source, buffer_for, micro_batches
from ondevice_trgl.run.relay import Relay


class Lane(Protocol):
    """How one slot gets to the GPU."""

    def wait_until_read(self) -> None:
        """Until what was in the slot's memory here is on the GPU."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """The first of each pair into the second, beside what the GPU computes, once nothing uses that any more."""

    def arrive(self) -> None:
        """What the GPU is asked for from now on comes after the copy."""

    def leave(self) -> None:
        """All that uses `device` has been asked for."""


class _Slot:
    """Memory for one micro-batch: here, pinned, and on the GPU."""

    def __init__(
        self, micro: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, lane: Lane
    ) -> None:
        self.host = buffer_for(micro, shape, dtype, pinned=device.type == "cuda")
        self.device = torch.zeros_like(self.host, device=device)
        self.lane = lane
        self.labels = torch.empty(0)
        self.holds: object = None
        """Which samples of what."""


class Feed:
    """The samples that a module trains on, (micro, *shape) at a time, on `device`.

    Memory: one input buffer on the CPU; on a GPU two there, and two pinned ones here.
    """

    def __init__(
        self,
        micro: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        lanes: Sequence[Lane] = (),
    ) -> None:
        self._device = device
        if device.type == "cuda" and not lanes:
            side = torch.cuda.Stream(device)
            lanes = [_CudaLane(side), _CudaLane(side)]
        self._slots = [_Slot(micro, shape, dtype, device, lane) for lane in lanes]
        self.buffer = self._slots[0].host if self._slots else buffer_for(micro, shape, dtype)
        """Memory for one micro-batch on the CPU, for whoever reads a source himself while no step is made."""
        self._next = 0

    def micro_batches(
        self, source: Source, indices: Sequence[int], following: Sequence[int] = ()
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(z, labels) of the samples `indices` on the device; z is overwritten by one that comes later.

        With `following`, the samples of the next call, the first of those are on their way when this is at its end.
        """
        if not self._slots:
            yield from micro_batches(source, indices, self.buffer)
            return
        micro = len(self.buffer)
        parts = [indices[at : at + micro] for at in range(0, len(indices), micro)]
        for number, part in enumerate(parts):
            slot = self._found(source, part) or self._send(source, part)
            slot.holds = None
            slot.lane.arrive()
            try:
                yield slot.device, slot.labels
            finally:
                slot.lane.leave()  # what works on it has been asked for; meanwhile the next one can be read
            after = parts[number + 1] if number + 1 < len(parts) else following[:micro]
            if len(after) and not isinstance(source, Relay):
                self._send(source, after)

    def _found(self, source: Source, part: Sequence[int]) -> _Slot | None:
        """The slot that was filled ahead with these, if one was."""
        return next((slot for slot in self._slots if slot.holds == (id(source), *part)), None)

    def _send(self, source: Source, part: Sequence[int]) -> _Slot:
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        slot.holds = None
        if isinstance(source, Relay):  # it is on the GPU itself
            labels = source.read(part, slot.device)
        else:
            if isinstance(source, BoundaryCache) and (views := source.views(part)) is not None:
                labels = source.labels_of(part)
                slot.lane.copy(list(zip(views, slot.device, strict=True)))
            else:
                slot.lane.wait_until_read()
                labels = source.read(part, slot.host)
                slot.lane.copy([(slot.host, slot.device)])
        slot.labels = labels.to(self._device, non_blocking=True)
        slot.holds = id(source), *part
        return slot


class _CudaLane:
    """Copies on a stream of their own."""

    def __init__(self, side: torch.cuda.Stream) -> None:
        self._side = side
        self._copied, self._left = torch.cuda.Event(), torch.cuda.Event()

    def wait_until_read(self) -> None:
        self._copied.synchronize()

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._side.wait_event(self._left)
        with torch.cuda.stream(self._side):
            for here, there in pairs:
                there.copy_(here, non_blocking=True)
        self._copied.record(self._side)

    def arrive(self) -> None:
        torch.cuda.current_stream(self._side.device).wait_event(self._copied)

    def leave(self) -> None:
        self._left.record(torch.cuda.current_stream(self._side.device))
