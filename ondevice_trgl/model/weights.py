"""Weights that a network starts from, read out of a file tensor by tensor into the memory that it has already.

The file is safetensors, or what `torch.save(model.state_dict(), FILE)` writes; its names are those of the state dict.
Nothing but tensors is unpickled. Floating-point tensors are cast to the dtype that the model has: half precision
widens without loss, double is rounded. All other dtypes must be the model's own.
"""

import hashlib
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ondevice_trgl.bounded import opened
from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.device.pages import drop_pages
from ondevice_trgl.errors import ConfigError, DamagedFileError, UsageError
from ondevice_trgl.model.header import read_header
from ondevice_trgl.model.store import aliases_of, state_of
from ondevice_trgl.model.tensorfile import DTYPES

PIECE_BYTES = 4 << 20
_RESAVE = "where you trust it: torch.save(model.state_dict(), FILE), or safetensors.torch.save_file"
_COUNTER = "num_batches_tracked"
"""Of BatchNorm: files from before torch 0.4.1 lack it, torchvision's among them; torch starts it at zero then."""
Kind = tuple[tuple[int, ...], torch.dtype]


class _Source(Protocol):
    kinds: dict[str, Kind]
    """Shape and dtype by name."""

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The elements of `name` in order, flat, at most PIECE_BYTES at a time; each holds until the next."""
        ...


@dataclass(frozen=True)
class Filled:
    """What was read of a file of weights."""

    digest: str
    """Of what was read, the same for both formats."""
    left: str = ""
    """A layer that was left as it was initialised, as the file has it for other classes."""
    why: str = ""
    """That in words."""


def read_weights(
    path: Path,
    model: nn.Module,
    *,
    skip: Sequence[str] = (),
    written: Callable[[], None] | None = None,
    classes: int | None = None,
) -> Filled:
    """Fill the tensors of `model` in place from `path`.

    Tensors that `skip` names, by their own name or that of a layer they are in, stay as they are. So do, with
    `classes`, those of one layer which gives that many outputs and in the file another number, where nothing else is
    amiss: the caller has to see that it is the classifier. `written` is called behind every piece, for tensors that can
    leave memory then.
    Memory: a few megabytes, but for tensors with gaps between their elements, which are read whole. A torch file is
    mapped, which counts in RLIMIT_DATA. Raises UsageError where it cannot be read, ConfigError with every tensor that
    does not fit.
    """
    source = _opened(path)
    digest = hashlib.blake2b(digest_size=16)
    targets, left, why = _matched(path, source.kinds, model, skip, classes)
    for name, target in targets.items():
        shape, dtype = source.kinds[name]
        digest.update(repr((name, shape, str(dtype))).encode())
        whole = target if target.is_contiguous() else torch.empty(shape, dtype=dtype)
        flat, filled = whole.view(-1), 0
        for piece in source.pieces(name):
            digest.update(bytes_of(piece))
            flat[filled : filled + len(piece)].copy_(piece)
            filled += len(piece)
            if written is not None:
                written()
        if whole is not target:
            target.copy_(whole)
    return Filled(digest.hexdigest(), left, why)


def _matched(
    path: Path, kinds: Mapping[str, Kind], model: nn.Module, skip: Sequence[str], classes: int | None
) -> tuple[dict[str, Tensor], str, str]:
    """By name in the file, the tensors of `model` to fill; the layer that is left, and why, as Filled has them.

    Raises ConfigError with everything that does not fit.
    """
    targets, aliases = state_of(model), aliases_of(model)

    def is_skipped(*names: str) -> bool:
        return any(name == one or name.startswith(f"{one}.") for name in names for one in skip)

    unused = [one for one in skip if not any(n == one or n.startswith(f"{one}.") for n in (*aliases, *kinds))]
    faults = [f"{one}, which is to be skipped, is no tensor or layer of model or file" for one in unused]
    matched: dict[str, Tensor] = {}
    unfit: list[str] = []
    resized: dict[str, int] = {}  # outputs in the file of what gives `classes` in the model
    for name, target in targets.items():
        if is_skipped(*aliases[name]):
            continue
        own = tuple(target.shape), target.dtype
        found = next((alias for alias in aliases[name] if alias in kinds), None)
        if found is None:
            if name.rpartition(".")[2] != _COUNTER:
                faults.append(f"missing in the file: {name} {_words(own)}")
                unfit.append(name)
            continue
        shape, dtype = kinds[found]
        castable = dtype == own[1] or (dtype.is_floating_point and own[1].is_floating_point)
        if shape != own[0] or not castable:
            faults.append(f"{found} is {_words(kinds[found])} in the file, {_words(own)} in the model")
            unfit.append(found)
            if castable and shape[1:] == own[0][1:] and shape[:1] != own[0][:1] == (classes,):
                resized[found] = shape[0]
        matched[found] = target.detach()
    foreign = [name for name in kinds if name not in aliases and not is_skipped(name)]
    faults += [f"unknown to the model: {name} {_words(kinds[name])}" for name in foreign]
    layers = {name.rpartition(".")[0] for name in resized}
    if resized and len(faults) == len(resized) and len(layers) == len(set(resized.values())) == 1:
        (layer,), (others,) = layers, set(resized.values())
        why = f"{layer} is for {others} classes in {path.name} and for {classes} here: left as it is initialised"
        return {name: tensor for name, tensor in matched.items() if name not in resized}, layer, why
    if faults:
        names = [*unfit, *foreign]
        raise ConfigError(faults, source=str(path), hint=_hint(names) if names else "names are those of the state dict")
    return matched, "", ""


def _hint(names: Sequence[str]) -> str:
    if len(names) > 8:
        return "the file is of another model, or of other settings of it; names are those of the state dict"
    return (
        f"--weights-skip {','.join(names)} leaves what is in the model as it is initialised, and in the file aside "
        "(layers can be named too)"
    )


def _words(kind: Kind) -> str:
    return f"{kind[0]} {str(kind[1]).removeprefix('torch.')}"


def _opened(path: Path) -> _Source:
    try:
        with opened(path, follow=True) as file:
            start = file.read(4)
    except OSError as error:
        raise UsageError(f"weights {path} cannot be read: {error.strerror}", hint="check the path") from None
    if start == b"PK\x03\x04":
        return _TorchFile(path)
    try:
        return _SafetensorsFile(path)
    except UsageError:
        if start[:1] != b"\x80":
            raise
        raise UsageError(
            f"weights {path} are a pickle, or a torch file of before 1.6: reading it would run what it says",
            hint=f"write them anew {_RESAVE}",
        ) from None


class _SafetensorsFile:
    """Read with plain reads: mapped pages would count in RSS."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._header, _, self._start = read_header(path, follow=True)
        except DamagedFileError as error:
            raise UsageError(
                f"weights {path} are neither safetensors nor a torch file: {error}", hint=f"write them {_RESAVE}"
            ) from error
        self.kinds = {name: (tuple(entry["shape"]), DTYPES[entry["dtype"]]) for name, entry in self._header.items()}

    def pieces(self, name: str) -> Iterator[Tensor]:
        shape, dtype = self.kinds[name]
        left = math.prod(shape)
        buffer = torch.empty(min(left, PIECE_BYTES // dtype.itemsize), dtype=dtype)
        with opened(self._path, follow=True) as file:
            file.seek(self._start + self._header[name]["data_offsets"][0])
            while left:
                piece = buffer[: min(left, len(buffer))]
                target = bytes_of(piece)
                while target:
                    count = file.readinto(target)  # type: ignore[attr-defined]  # it is a raw file
                    if not count:
                        raise DamagedFileError(f"{self._path} ends early")
                    target = target[count:]
                yield piece
                left -= len(piece)


class _TorchFile:
    """Mapped by torch, each piece of a tensor dropped from memory behind it."""

    def __init__(self, path: Path) -> None:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise UsageError(
                f"weights {path} hold more than tensors, and reading them would run what the file says: "
                f"{_first_line(error)}",
                hint=f"write the state dict alone {_RESAVE}",
            ) from error
        except (RuntimeError, OSError, EOFError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise UsageError(
                f"weights {path} cannot be read: {_first_line(error)}", hint=f"write them anew {_RESAVE}"
            ) from error
        if not isinstance(held, Mapping) or not all(_is_plain(value) for value in held.values()):
            raise UsageError(
                f"weights {path} are no state dict: {_described(held)}",
                hint=f"write the state dict alone {_RESAVE}",
            )
        self._tensors: dict[str, Tensor] = {str(name): tensor for name, tensor in held.items()}
        self.kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def pieces(self, name: str) -> Iterator[Tensor]:
        tensor = self._tensors[name].detach()
        size = PIECE_BYTES // tensor.element_size()
        flat = tensor.reshape(-1)  # a copy, where elements have gaps
        for start in range(0, len(flat), size):
            piece = flat[start : start + size]
            yield piece
            if flat.data_ptr() == tensor.data_ptr():
                drop_pages(piece.data_ptr(), len(piece) * piece.element_size())


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized


def _described(held: Any) -> str:
    if not isinstance(held, Mapping):
        return f"the file holds a {type(held).__name__}"
    others = [f"{name} ({type(value).__name__})" for name, value in held.items() if not _is_plain(value)]
    return f"it holds {', '.join(others[:4])}{' and more' if len(others) > 4 else ''}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # of what torch says about a refused class only the sentence that names it
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (named or lines or [type(error).__name__])[0][:200]
