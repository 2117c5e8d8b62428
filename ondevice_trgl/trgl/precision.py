"""Forward passes in bfloat16, weights and gradients in float32."""

from typing import Any

import torch
from torch import Tensor, nn


class InPrecision(nn.Module):
    """`part` under autocast to `dtype`, in the second forward pass of a checkpoint too.

    Weights are not kept in both precisions longer than an operator, or its backward pass, needs them.
    """

    def __init__(self, part: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.part, self._dtype = part, dtype
        self.training = part.training

    def forward(self, z: Tensor) -> Any:
        with torch.autocast(z.device.type, self._dtype, cache_enabled=False):
            return self.part(z)


def in_precision(part: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """`part`, under autocast where there is a `dtype`."""
    return part if dtype is None else InPrecision(part, dtype)


def whole_precision(out: Tensor) -> Tensor:
    """`out` in float32 where it is in bfloat16, else as it is."""
    return out.float() if out.dtype == torch.bfloat16 else out
