"""What autograd keeps for a backward pass, in a file instead of in memory."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.errors import StorageError

_SMALL_BYTES = 64 << 10
_PIECE_BYTES = 8 << 20


@contextlib.contextmanager
def saved_on_disk(folder: Path, held: Sequence[Tensor]) -> Iterator[None]:
    """Tensors that autograd saves inside go to a file in `folder`, and come back in the backward pass.

    But for small ones and those in the memory of `held`, which are there anyway. Raises StorageError.
    """
    storages = {tensor.untyped_storage().data_ptr() for tensor in held}
    try:
        file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 -- closed below
    except OSError as error:
        raise _failed(folder, error) from error

    def pack(tensor: Tensor) -> Any:
        size = tensor.numel() * tensor.element_size()
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if size < _SMALL_BYTES or not plain or tensor.untyped_storage().data_ptr() in storages:
            return tensor
        data = bytes_of(tensor.detach().contiguous())
        try:
            position = file.seek(0, 2)
            for start in range(0, len(data), _PIECE_BYTES):
                file.write(data[start : start + _PIECE_BYTES])
        except OSError as error:
            raise _failed(folder, error) from error
        return position, tuple(tensor.shape), tensor.dtype

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        position, shape, dtype = packed
        tensor = torch.empty(shape, dtype=dtype)
        file.seek(position)
        data = bytes_of(tensor)
        read = 0
        while read < len(data):
            got = file.readinto(data[read:])
            if not got:
                raise StorageError(f"what was written to {folder} cannot be read back", hint="check the disk")
            read += got
        return tensor

    with file, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _failed(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"cannot write to {folder}, where activations go: {error.strerror}",
        hint="free some disk space, or choose another --run-dir",
    )
