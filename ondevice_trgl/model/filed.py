"""A network built with its weights in a file: they take address space, and memory only while they are being touched.

While a model is built, every large tensor that it registers moves into a shared mapping of a scratch file. Whatever
initialises it in place afterwards writes to pages of that file, and pages of a file can leave memory at any moment
without being lost. The model's own objects stay what they are: parameters, ties and views of them.
"""

import contextlib
import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.errors import StorageError

SMALLEST_BYTES = 64 << 10
"""A tensor below this stays where it is."""
MOST_BYTES = 12 << 20
"""Of mapped tensors may be touched before their pages are dropped; one tensor alone may be larger."""
_PIECE_BYTES = 8 << 20
_SLAB_BYTES = 64 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COPIES: tuple[Any, ...] = (Tensor.clone, Tensor.__deepcopy__)


@contextlib.contextmanager
def weights_in_file(folder: Path) -> Iterator["FiledWeights"]:
    """What is built inside has its large tensors in a file in `folder`, which no other program sees.

    Memory: the tensor that is being initialised and `MOST_BYTES`. Beyond that: tensors that are made and filled before
    they are registered, and tensors whose memory something else holds too. On a tmpfs the file itself is memory. Where
    `folder` cannot be mapped, the model is built as ever. Raises StorageError where the disk fails or is full.
    """
    weights = FiledWeights(folder)
    with contextlib.ExitStack() as undo:
        undo.callback(weights.close)
        for register, moved in (
            (hooks.register_module_parameter_registration_hook, weights.take_tensor),
            (hooks.register_module_buffer_registration_hook, weights.take_tensor),
            (hooks.register_module_module_registration_hook, weights.take),
        ):
            undo.callback(register(_hook(moved)).remove)
        undo.enter_context(_Watching(weights))
        try:
            yield weights
        except Exception as error:
            if weights.failure is not None and error is not weights.failure:
                raise weights.failure from error  # whatever the model's code made of it
            raise


def _hook(moved: Callable[[Any], None]) -> Callable[..., None]:
    def registered(module: nn.Module, name: str, value: Any) -> None:
        if value is not None:
            moved(value)

    return registered


class FiledWeights:
    """Tensors in mappings of one file, which is gone once this object and the last of the tensors are."""

    def __init__(self, folder: Path) -> None:
        self.failure: StorageError | None = None
        self._folder = folder
        self._refused = False
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 -- lives as long as this
        except OSError as error:
            raise self._failed(error) from error
        self._slabs: list[mmap.mmap] = []
        self._end = self._used = self._start = 0
        self._mapped: set[int] = set()
        self._touched: dict[int, int] = {}
        """Bytes by address, since pages were dropped."""

    def close(self) -> None:
        """Take no more tensors. Those that were taken stay mapped."""
        self._refused = True
        self._file.close()
        self.release()

    def take(self, module: nn.Module) -> None:
        """Move the large tensors of `module` into the file, but those that are there. Raises StorageError."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.take_tensor(tensor)

    def take_tensor(self, tensor: Tensor) -> None:
        """Move one tensor, if it is large and nothing else holds its memory. Raises StorageError."""
        if self._refused or not _is_plain(tensor):
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        if size < SMALLEST_BYTES or not storage.resizable() or not _is_alone(storage):
            return  # a storage that cannot be resized is a mapping already, or memory of somebody else's
        place = self._reserve(size)
        if place is None:
            return
        slab, offset = place
        try:
            self._write(bytes_of(_whole(storage)), self._start + offset)
        except OSError as error:
            raise self._failed(error) from error
        mapped = torch.frombuffer(slab, dtype=torch.uint8, count=size, offset=offset).untyped_storage()
        self._mapped.add(mapped.data_ptr())
        view = torch.empty(0, dtype=tensor.dtype)
        tensor.data = view.set_(mapped, tensor.storage_offset(), tensor.shape, tensor.stride())

    def release(self) -> None:
        """Drop all pages of the file from this process. What was written stays, in the file and its cache."""
        self._touched.clear()
        for slab in self._slabs:
            if hasattr(mmap, "MADV_DONTNEED"):
                slab.madvise(mmap.MADV_DONTNEED)

    @contextlib.contextmanager
    def dropped_as_read(self) -> Iterator[None]:
        """Layers that run inside leave no weights in memory behind them, beyond `MOST_BYTES`."""

        def runs(module: nn.Module, args: Any) -> None:
            self.touching(tensor for tensor in module.parameters() if self.holds(tensor))

        def ran(module: nn.Module, args: Any, result: Any) -> None:
            self.touched()

        before, behind = hooks.register_module_forward_pre_hook(runs), hooks.register_module_forward_hook(ran)
        try:
            yield
        finally:
            before.remove()
            behind.remove()
            self.release()

    def holds(self, tensor: Any) -> bool:
        """Whether it lies in the file."""
        return _is_plain(tensor) and tensor.untyped_storage().data_ptr() in self._mapped

    def touching(self, tensors: Iterable[Tensor]) -> None:
        """These, of which each lies in the file, are about to be read or written: pages of others may have to go."""
        storages = [tensor.untyped_storage() for tensor in tensors]
        coming = {storage.data_ptr(): storage.nbytes() for storage in storages}
        if sum((self._touched | coming).values()) > MOST_BYTES:
            self.release()
        self._touched |= coming

    def touched(self) -> None:
        """What was touched is not needed at this moment: its pages go if it was too much."""
        if sum(self._touched.values()) > MOST_BYTES:
            self.release()

    def _reserve(self, size: int) -> tuple[mmap.mmap, int] | None:
        """A mapping and where in it `size` bytes are free, on disk too; None where there can be no mapping."""
        offset = -(-self._used // 64) * 64
        try:
            if not self._slabs or offset + size > len(self._slabs[-1]):
                length = -(-max(size, _SLAB_BYTES) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
                os.ftruncate(self._file.fileno(), self._end + length)
                self._slabs.append(mmap.mmap(self._file.fileno(), length, offset=self._end))
                self._start, self._end, offset = self._end, self._end + length, 0
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                raise self._failed(error) from error
            self._refused = True
            return None
        try:  # a page that the disk has no room for would end the process when it is written to
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), self._start + offset, size)
        except OSError as error:
            if error.errno in _FULL:
                raise self._failed(error) from error
        self._used = offset + size
        return self._slabs[-1], offset

    def _write(self, data: memoryview, position: int) -> None:
        # not through the mapping: its pages would count
        while data:
            written = os.pwrite(self._file.fileno(), data[:_PIECE_BYTES], position)
            data, position = data[written:], position + written

    def _failed(self, error: OSError) -> StorageError:
        self.failure = StorageError(
            f"cannot write to {self._folder}, where the model's weights go: {error.strerror}",
            hint="free some disk space, or choose another --run-dir",
        )
        return self.failure


class _Watching(TorchFunctionMode):
    """Sees every call of torch: which touch mapped tensors, and which copy one."""

    def __init__(self, weights: FiledWeights) -> None:
        super().__init__()
        self._weights = weights

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        held = [value for value in (*args, *kwargs.values()) if self._weights.holds(value)]
        if not held or getattr(func, "__name__", "") in ("__get__", "__set__"):
            return func(*args, **kwargs)
        self._weights.touching(held)
        result = func(*args, **kwargs)
        if func in _COPIES:
            self._weights.take_tensor(result)
        self._weights.touched()
        return result


def _is_plain(tensor: Any) -> bool:
    """A tensor whose memory is what torch's own allocator gives: not sparse, lazy, or of a class of somebody's."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_inference() or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _is_alone(storage: torch.UntypedStorage) -> bool:
    """Whether one tensor alone holds `storage`: others would be left behind."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count is not None and count(storage._cdata) == 2  # the tensor, and `storage`


def _whole(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)
