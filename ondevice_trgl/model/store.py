"""Weights and optimizer state of the modules on disk: load one, evict it, and the memory is free again.

One safetensors file a module, `modules/03.safetensors`. Tensor names are the network's own behind a prefix:
`module.` for the local module, `head.` for its auxiliary head, `optim.` for the optimizer, `run.` for the rest.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ondevice_trgl.errors import DamagedFileError
from ondevice_trgl.model.header import position_in, read_header
from ondevice_trgl.model.module_files import ModuleFiles
from ondevice_trgl.model.tensorfile import copy_tensors, read_tensors, write_tensors

NET, MARK = "net", "!"
"""A local module holds the network's layers in a child of that name, so that none of their names is one of its own.
Behind a Python keyword comes a mark, as code cannot name it.
"""
_SHAPE = "_evicted_shape"


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that `module` holds, with its name: parameters, buffers, and plain attributes of its layers.

    One that is held in two places comes twice.
    """
    for prefix, layer in module.named_modules():
        for name, value in (*layer._parameters.items(), *layer._buffers.items(), *layer.__dict__.items()):
            if isinstance(value, Tensor):
                yield f"{prefix}.{name}" if prefix else name, value


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """What is saved, loaded and evicted of a module: `tensors_of` by name, each tensor once, without copies.

    A local module's are named as in its network.
    """
    seen: set[int] = set()
    state = {}
    is_local = isinstance(module, fx.GraphModule)
    for name, tensor in tensors_of(module):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name.removeprefix(f"{NET}.").replace(MARK, "") if is_local else name] = tensor
    return state


class ModuleStore(ModuleFiles):
    """Module files in one folder. The tensors of an evicted module hold no memory until it is loaded.

    A module that was never saved is read from the file `staged`, which has the whole network's tensors under its own
    names; `fresh_head(index)` makes the head that it starts with.
    """

    def __init__(
        self,
        folder: Path,
        staged: Path | None = None,
        fresh_head: Callable[[int], nn.Module | None] = lambda index: None,
    ) -> None:
        super().__init__(folder)
        self.staged, self._fresh_head = staged, fresh_head
        self.written_bytes = 0
        """To disk, since this store was made."""

    def save(
        self,
        index: int,
        module: nn.Module,
        head: nn.Module | None,
        position: Mapping[str, Any],
        *,
        optim: Mapping[str, Tensor] | None = None,
        run: Mapping[str, Tensor] | None = None,
        pending: bool = False,
    ) -> int:
        """Write module `index` as it stands, atomically; returns the bytes written. `position` is JSON-ready.

        What was saved before stays on disk, for `take_before`, until another module is saved. With `pending`, it stays
        the module's until `commit`.
        """
        tensors = {f"module.{name}": tensor for name, tensor in state_of(module).items()}
        if head is not None:
            tensors |= {f"head.{name}": tensor for name, tensor in state_of(head).items()}
        for prefix, extra in (("optim.", optim), ("run.", run)):
            tensors |= {prefix + name: tensor for name, tensor in (extra or {}).items()}
        path, before = (self.pending(index), None) if pending else (self.path(index), self.before(index))
        size = write_tensors(path, tensors, {"position": json.dumps(position)}, before=before)
        if not pending:
            self.forget(but=(index,))
        self.wrote(size)
        return size

    def wrote(self, size: int) -> None:
        """Count bytes that someone else writes for a module."""
        self.written_bytes += size

    def load(self, index: int, module: nn.Module, head: nn.Module | None, device: torch.device) -> None:
        """Fill module and head in place, on `device`, without their optimizer state. Raises DamagedFileError.

        Reads one tensor at a time into the memory that it stays in.
        """
        if not self.has(index) and self.staged is not None:
            wanted = state_of(module).keys()
            tensors = read_tensors(self.staged, lambda name: name in wanted)
            fill(module, {name: tensor.to(device) for name, tensor in tensors.items()}, self.staged)
            if head is not None and (fresh := self._fresh_head(index)) is not None:
                fill(head, {name: tensor.data.to(device) for name, tensor in state_of(fresh).items()}, self.staged)
            return
        for prefix, target in (("module.", module), ("head.", head)):
            if target is not None:
                fill(target, self._read(index, prefix, device), self.path(index))

    def load_model(self, model: nn.Module) -> None:
        """Fill the whole network from the files of all modules. Raises DamagedFileError."""
        aliases, places, found = aliases_of(model), self._places(), {}
        for name in state_of(model):
            if (place := self._newest(aliases[name], places)) is not None:
                file, kept = place
                found[name] = read_tensors(file, kept.__eq__)[kept]
        fill(model, found, self.folder)

    def _places(self) -> dict[str, tuple[Path, str]]:
        """By a tensor's name in the network: the file that holds it as it is now, and its name there."""
        places: dict[str, tuple[Path, str]] = {}
        if self.staged is not None and self.staged.is_file():
            places = {name: (self.staged, name) for name in read_header(self.staged)[0]}
        for file in sorted(self.folder.glob("*.safetensors")):
            names = (name for name in read_header(file)[0] if name.startswith("module."))
            places |= {name.removeprefix("module."): (file, name) for name in names}
        return places

    def _newest(self, names: Iterable[str], places: Mapping[str, tuple[Path, str]]) -> tuple[Path, str] | None:
        """Of a tensor with several names, the place where a module was saved before that where it was staged."""
        known = [places[name] for name in names if name in places]
        return next((place for place in known if place[0] != self.staged), known[0] if known else None)

    def load_extra(self, index: int, what: str, device: torch.device) -> dict[str, Tensor]:
        """The tensors that were saved as `what`: "optim" or "run"; none where nothing was."""
        if not self.has(index):
            return {}
        return self._read(index, f"{what}.", device)

    def _read(self, index: int, prefix: str, device: torch.device) -> dict[str, Tensor]:
        tensors = read_tensors(self.path(index), lambda name: name.startswith(prefix))
        return {name.removeprefix(prefix): tensor.to(device) for name, tensor in tensors.items()}

    def assemble(
        self, path: Path, aliases: Mapping[str, tuple[str, ...]], metadata: Mapping[str, str] | None = None
    ) -> int:
        """Write the whole network's state dict to `path` from the files of all modules.

        `aliases` as `aliases_of` gives it. A megabyte in memory at a time. Raises StorageError, DamagedFileError.
        """
        places, sources = self._places(), {}
        for name, names in aliases.items():
            if (place := self._newest(names, places)) is None:
                raise DamagedFileError(f"{self.folder} lacks {name}", hint="the run was made with another model")
            sources[name] = place
        size = copy_tensors(path, sources, metadata)
        self.wrote(size)
        return size

    def position(self, index: int) -> dict[str, Any]:
        """What was saved as the position of module `index`, empty where nothing was; no tensor is read.

        Raises DamagedFileError.
        """
        return position_in(self.path(index))


def aliases_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For every name in the model's state dict, all names of the same tensor (tied weights have several)."""
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: tuple(names[id(tensor)]) for name, tensor in state.items()}


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Give the tensors of `module` the memory of `tensors`. DamagedFileError where names, shapes or dtypes differ.

    But for what is in no state dict (plain attributes, non-persistent buffers), which a forward pass may have made
    anew: that takes the form that it had, and the next pass makes it anew again.
    """
    own = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    state = state_of(module)
    plain = {name for name, tensor in state.items() if id(tensor) not in own}
    targets = {name: tensor for name, tensor in state.items() if name in tensors or name not in plain}
    missing = sorted(targets.keys() - tensors.keys())
    foreign = sorted(name for name in tensors.keys() - state.keys() if not _has_attribute(module, name))
    if missing or foreign:
        raise DamagedFileError(
            f"{source} does not fit the model: missing {missing[:3] or 'nothing'}, unknown {foreign[:3] or 'nothing'}",
            hint="the run was made with another model or partition",
        )
    for name, target in targets.items():
        found = tensors[name]
        if name not in plain and (tuple(found.shape), found.dtype) != (shape_of(target), target.dtype):
            raise DamagedFileError(
                f"{source} does not fit the model: {name} is {tuple(found.shape)} {found.dtype} there, "
                f"{shape_of(target)} {target.dtype} in the model",
                hint="the run was made with another model",
            )
    for name, target in targets.items():
        target.data = tensors[name]
        target.grad = None
        if name in plain and hasattr(target, _SHAPE):
            delattr(target, _SHAPE)


def _has_attribute(module: nn.Module, path: str) -> bool:
    """Whether a layer of `module` has an attribute `path` that is no parameter, buffer or layer."""
    *parts, name = path.split(".")
    try:
        return name in module.get_submodule(".".join(parts)).__dict__
    except AttributeError:
        return False


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Shape of `tensor`, also while it is evicted."""
    shape: tuple[int, ...] = getattr(tensor, _SHAPE, tuple(tensor.shape))
    return shape


def is_evicted(module: nn.Module) -> bool:
    """Whether `module` has parameters, and none of them holds memory."""
    parameters = list(module.parameters())
    return bool(parameters) and all(p.numel() == 0 for p in parameters)


def bytes_in(tensors: Iterable[Tensor]) -> int:
    """Bytes of `tensors`, also of those that are evicted."""
    return sum(math.prod(shape_of(tensor)) * tensor.element_size() for tensor in tensors)


def parameter_count(*modules: nn.Module | None) -> int:
    """Parameters (elements) of `modules`, also of those that are evicted; what they share counts for each."""
    return sum(math.prod(shape_of(p)) for module in modules if module is not None for p in module.parameters())


def fill_with_noise(*modules: nn.Module | None, device: torch.device | None = None) -> None:
    """Give evicted tensors memory of their own again, with values that train: for measuring what they take.

    On `device`, or where they were.
    """
    for tensor in _tensors(modules):
        values = torch.ones(shape_of(tensor), dtype=tensor.dtype, device=device or tensor.device)
        # a variance is positive
        tensor.data = values.normal_(0.0, 0.05) if isinstance(tensor, nn.Parameter) else values


def evicted(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`tensor`, which holds nothing, as one of `shape` that is evicted."""
    setattr(tensor, _SHAPE, shape)
    return tensor


def evict(*modules: nn.Module | None) -> None:
    """Drop the memory of parameters, gradients and persistent buffers. What is to be kept must be saved before."""
    for tensor in _tensors(modules):
        tensor.grad = None
        if not hasattr(tensor, _SHAPE):
            setattr(tensor, _SHAPE, tuple(tensor.shape))  # what a file is checked against when it is loaded
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def _tensors(modules: tuple[nn.Module | None, ...]) -> Iterator[Tensor]:
    for module in modules:
        if module is not None:
            yield from state_of(module).values()
