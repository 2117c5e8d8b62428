"""CPU memory that a GPU copies from and to by itself, at the full speed of the bus."""

import torch
from torch import Tensor

from ondevice_trgl.errors import TrglError


def pin(block: Tensor) -> None:
    """Have a GPU copy from and to `block` by itself: its memory stays where it is, and is not swapped out.

    In place, so that it takes no more than its size: torch's own pinned memory comes in powers of two and is kept.
    Undo with `unpin` before the memory is given back. Raises MemoryError where the system allows no more.
    """
    if block.numel():
        code = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.numel() * block.element_size(), 0)
        if int(code) == 2:  # cudaErrorMemoryAllocation
            raise MemoryError(f"{block.numel() * block.element_size()} bytes of memory cannot be pinned")
        if int(code):
            raise TrglError(f"memory cannot be pinned: CUDA error {int(code)}", hint="use --cache disk")


def unpin(block: Tensor) -> None:
    """Undo `pin`, once all copies are done."""
    if block.numel():
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
