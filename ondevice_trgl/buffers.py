"""The memory of a tensor as bytes, for reading a file straight into it and writing it straight out."""

import ctypes

from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable, without a copy and without numpy. Keeps the tensor alive.

    Raises ValueError for a tensor that is elsewhere or has gaps.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous CPU tensor, not one on {tensor.device} with strides {tensor.stride()}")
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return memoryview(bytearray())
    array = (ctypes.c_uint8 * size).from_address(tensor.data_ptr())
    array._owner = tensor  # type: ignore[attr-defined]  # the view holds the array, the array holds the tensor
    return memoryview(array).cast("B")
