"""How activations are kept: number formats of a row, and what of a value is lost in them.

fp32, bf16 and fp16 are torch's. int8 keeps one byte a value, between the least and the largest of its group: a channel
of the sample, or the whole sample where its channels are of few values. Both ends are kept with the row: nothing has to
be known of the data before.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NARROWER = ("fp32", "bf16", "int8")
"""What `auto` goes through, where disk space is short."""
MOST_ERROR = 0.02
"""Share of the values' size (root mean square) that may be lost; above it a wider format is taken."""
_ALL = 1e9
"""Stands for all of them, where what was kept is infinite: a number that JSON has."""
_WIDER = {"int8": "bf16", "fp16": "bf16", "bf16": "fp32"}
_LEVELS = 255
_LEAST_VALUES = 16
"""Of a channel with ends of its own, eight bytes."""


@dataclass(frozen=True)
class Codec:
    """Rows of `shape` kept as `dtype`: fp32 | bf16 | fp16 | int8."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def _values(self) -> int:
        return math.prod(self.shape)

    @property
    def _groups(self) -> int:
        if len(self.shape) < 2 or not self._values:
            return 1
        return self.shape[0] if self._values // self.shape[0] >= _LEAST_VALUES else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it is kept."""
        if self.dtype == "int8":
            return -(-(8 * self._groups + self._values) // 8) * 8  # so that numbers lie where they may be read
        return FLOATS[self.dtype].itemsize * self._values

    def encode(self, block: Tensor) -> Tensor:
        """(n, *shape) of any float dtype, on any device -> uint8 (n, row_bytes) on the CPU.

        Memory: the result, and for int8 one copy of the block.
        """
        if self.dtype != "int8":
            return block.detach().to("cpu", FLOATS[self.dtype]).contiguous().view(len(block), -1).view(torch.uint8)
        values = block.detach().to("cpu", torch.float32).reshape(len(block), self._groups, -1)
        low, high = values.amin(2), values.amax(2)
        step = (high - low).div_(_LEVELS)
        step[step == 0] = 1.0
        kept = (values - low.unsqueeze(2)).div_(step.unsqueeze(2)).round_()
        ends = torch.stack((low, step), dim=1).view(len(block), -1).view(torch.uint8)
        encoded = torch.zeros(len(block), self.row_bytes, dtype=torch.uint8)
        encoded[:, : ends.shape[1]] = ends
        encoded[:, ends.shape[1] :][:, : self._values] = kept.view(len(block), -1)
        return encoded

    def decode(self, rows: Tensor, out: Tensor) -> None:
        """uint8 (n, row_bytes) -> `out`, (n, *shape), of any dtype, on any device.

        Memory: nothing beside float32 on the CPU.
        """
        if self.dtype != "int8":
            out.copy_(rows.view(FLOATS[self.dtype]).view(out.shape))
            return
        first = 8 * self._groups
        ends = rows[:, :first].view(torch.float32).view(len(rows), 2, self._groups, 1)
        kept = rows[:, first : first + self._values].reshape(len(rows), self._groups, -1)
        is_plain = out.dtype == torch.float32 and out.device.type == "cpu" and out.is_contiguous()
        target = out.view(kept.shape) if is_plain else torch.empty(kept.shape)
        target.copy_(kept).mul_(ends[:, 1]).add_(ends[:, 0])
        if not is_plain:
            out.copy_(target.view(out.shape))

    def error(self, row: Tensor) -> float:
        """What is lost of `row`, (*shape): root mean square of the difference by that of the values; 0.0 for fp32."""
        if self.dtype == "fp32":
            return 0.0
        row = row.detach().to("cpu", torch.float32)
        again = torch.empty(1, *self.shape)
        self.decode(self.encode(row.unsqueeze(0)), again)
        size = float(row.square().mean())
        lost = float((again[0] - row).square().mean())
        if not math.isfinite(size):
            return 0.0  # the values themselves are at fault, and that is told elsewhere
        return math.sqrt(lost / size) if size and math.isfinite(lost) else (_ALL if lost else 0.0)

    def wider(self) -> "Codec":
        """The next wider format; fp32 is its own."""
        return Codec(_WIDER.get(self.dtype, "fp32"), self.shape)

    def and_wider(self) -> tuple[str, ...]:
        """This format and all that are wider."""
        return (self.dtype,) if self.dtype == "fp32" else (self.dtype, *self.wider().and_wider())


def row_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one sample's activation as it is kept."""
    return Codec(dtype, shape).row_bytes


def codec_for(dtype: str, block: Tensor) -> Codec:
    """For rows like those of `block`, (n, *shape): `dtype`, or the first wider format that loses little of them."""
    codec = Codec(dtype, tuple(block.shape[1:]))
    while codec.dtype != "fp32" and max(map(codec.error, block), default=0.0) > MOST_ERROR:
        codec = codec.wider()
    return codec
