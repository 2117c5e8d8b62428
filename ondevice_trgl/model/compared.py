"""Tensors of two runs compared, by some of their elements where they are large."""

import torch
from torch import Tensor

_SAMPLES = 1024
"""Elements of a large tensor that are compared, at even distances."""
_CLOSE = 1e-3
"""Of a tensor's largest element: the same operators in the same order differ by far less."""


def sample(tensor: Tensor) -> Tensor:
    """Some elements of `tensor`, as float32."""
    values = tensor.detach().coalesce().values() if tensor.is_sparse else tensor.detach()
    flat = values.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].float().clone()


def glimpse(tensor: Tensor) -> Tensor:
    """A few neighbouring elements: of a tensor in a file, little comes into memory."""
    flat = tensor.detach().reshape(-1)
    return flat[flat.numel() // 2 :][:64].clone()


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def close(got: Tensor, wanted: Tensor, least: float = 1e-7) -> bool:
    if got.shape != wanted.shape:
        return False
    known = wanted[wanted.isfinite()].abs()
    most = float(known.max()) if known.numel() else 0.0
    return torch.allclose(got.float(), wanted.float(), rtol=0.0, atol=_CLOSE * most + least, equal_nan=True)
