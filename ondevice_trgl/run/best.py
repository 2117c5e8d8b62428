"""The weights of a module's best epoch by validation, on disk while it trains on."""

import torch
from torch import Tensor, nn

from ondevice_trgl.errors import DamagedFileError
from ondevice_trgl.model.partition import LocalModule
from ondevice_trgl.model.store import ModuleStore, state_of
from ondevice_trgl.model.tensorfile import read_tensors, write_tensors


class Best:
    """Of module `index`, beside the file that `store` saves it in."""

    def __init__(self, store: ModuleStore, index: int, module: LocalModule, head: nn.Module | None) -> None:
        self._store, self._folder, self._name = store, store.folder, f"{index:03d}.best-"
        self._parts = {"head": head, **({} if module.frozen else {"module": module})}

    def _tensors(self) -> dict[str, Tensor]:
        parts = [(name, part) for name, part in self._parts.items() if part is not None]
        return {f"{name}.{path}": tensor for name, part in parts for path, tensor in state_of(part).items()}

    def keep(self, epoch: int) -> None:
        """Write what trains, as it is behind `epoch`; what was kept before stays until `drop`. Raises StorageError."""
        self._store.wrote(write_tensors(self._folder / f"{self._name}{epoch}", self._tensors()))

    @torch.no_grad()
    def bring_back(self, epoch: int) -> None:
        """Fill module and head in place, one tensor in memory at a time. Raises DamagedFileError."""
        path = self._folder / f"{self._name}{epoch}"
        for name, tensor in self._tensors().items():
            found = read_tensors(path, name.__eq__).get(name)
            if found is None or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
                raise DamagedFileError(f"{path} does not fit the module: {name}", hint="start a new run")
            tensor.copy_(found)

    def drop(self, *, but: int | None = None) -> None:
        """Remove what was kept of other epochs than `but`."""
        for path in self._folder.glob(f"{self._name}*"):
            if path.name != f"{self._name}{but}":
                path.unlink(missing_ok=True)
