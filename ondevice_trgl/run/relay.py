"""One batch on its way through the modules: what one of them puts out is what the next one reads."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Relay:
    """The boundary activations of one batch, as a source for the next module and a place for its output.

    Memory: two tensors on `device`, of (batch, *shape) at the widest boundary each.
    """

    def __init__(self, batch: int, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        self._batch = batch
        most = max((torch.Size(shape).numel() for shape in shapes), default=0)
        self._halves = [torch.zeros(batch * most, device=device) for _ in range(2)]
        self.labels = torch.zeros(batch, dtype=torch.int64)
        self._read = self._written = torch.empty(0)
        self.shape: tuple[int, ...] = ()
        """Of one sample that is read."""
        self._at = 0

    def begin(self, labels: Tensor, shape: tuple[int, ...]) -> None:
        """A new batch, in front of the first module, which puts out `shape`."""
        self.labels = labels
        if len(self._halves[0]):  # of one module alone nothing goes on
            self._open(shape)

    def _open(self, shape: tuple[int, ...]) -> None:
        size = torch.Size(shape).numel()
        self._written = self._halves[0][: self._batch * size].view(self._batch, *shape)
        self._at = 0

    def rewound(self) -> Callable[[Tensor], None]:
        """Takes the output of the module that is at work, a micro-batch a call, from the first sample on."""
        self._at = 0
        return self._put

    def _put(self, out: Tensor) -> None:
        self._written[self._at : self._at + len(out)].copy_(out)
        self._at += len(out)

    def advance(self, shape: tuple[int, ...]) -> None:
        """What was written becomes what is read; the next module puts out `shape`."""
        self._read = self._written
        self.shape = tuple(self._read.shape[1:])
        self._halves.reverse()
        self._open(shape)

    def read(self, indices: Sequence[int], out: Tensor) -> Tensor:
        """Fill the first rows of `out` with the samples `indices` of the batch; returns their labels."""
        rows = torch.as_tensor(list(indices))
        if out.device == self._read.device:
            torch.index_select(self._read, 0, rows.to(out.device), out=out[: len(rows)])
        else:
            out[: len(rows)].copy_(self._read[rows.to(self._read.device)])
        return self.labels[rows]
