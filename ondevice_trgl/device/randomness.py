"""The generators of random numbers that a network may draw from: torch's, the GPU's, Python's and numpy's."""

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ondevice_trgl.errors import DamagedFileError

_NONE = float("nan")
"""Stands for no Gaussian kept for the next call."""
_WORDS = 624
"""Of a Mersenne twister."""


@dataclass(frozen=True)
class Randomness:
    """The state of all of them at one moment; None for one that is not in use. Memory: 10 KB."""

    torch_cpu: Tensor | None = None
    torch_cuda: Tensor | None = None
    python: Any = None
    numpy: Any = None

    @classmethod
    def now(cls, device: torch.device) -> Self:
        """As they are, that of the GPU `device` among them."""
        numpy = sys.modules.get("numpy.random")
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            random.getstate(),
            None if numpy is None else numpy.get_state(),
        )

    def restore(self, device: torch.device) -> None:
        """Put them back to this state, as far as it has one. Raises DamagedFileError for one that is none."""
        try:
            self._restore(device)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise _damaged(error) from error

    def _restore(self, device: torch.device) -> None:
        if self.torch_cpu is not None:
            torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.torch_cuda, device)
        if self.python is not None:
            random.setstate(self.python)
        numpy = sys.modules.get("numpy.random")
        if self.numpy is not None and numpy is not None:
            numpy.set_state(self.numpy)

    def torchs(self) -> "Randomness":
        """Those of torch alone."""
        return Randomness(self.torch_cpu, self.torch_cuda)

    def tensors(self) -> dict[str, Tensor]:
        """As tensors by name, for a checkpoint."""
        found = {
            name: state for name, state in (("rng", self.torch_cpu), ("rng_cuda", self.torch_cuda)) if state is not None
        }
        if self.python is not None:
            _, numbers, kept = self.python
            found["rng_python"] = torch.tensor(numbers, dtype=torch.int64)
            found["rng_python_kept"] = torch.tensor([_NONE if kept is None else kept], dtype=torch.float64)
        if self.numpy is not None and self.numpy[0] == "MT19937":
            _, numbers, position, has_kept, kept = self.numpy
            found["rng_numpy"] = torch.tensor([*map(int, numbers), position], dtype=torch.int64)
            found["rng_numpy_kept"] = torch.tensor([kept if has_kept else _NONE], dtype=torch.float64)
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """From what `tensors` gave; of older checkpoints, which have less, what is there. Raises DamagedFileError."""
        try:
            return cls._of(tensors)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise _damaged(error) from error

    @classmethod
    def _of(cls, tensors: Mapping[str, Tensor]) -> Self:
        python = numpy = None
        if "rng_python" in tensors:
            python = 3, tuple(tensors["rng_python"].tolist()), _kept(tensors["rng_python_kept"])
        if "rng_numpy" in tensors:
            *numbers, position = tensors["rng_numpy"].tolist()
            if len(numbers) != _WORDS or not 0 <= position <= _WORDS:
                raise ValueError("numpy's has another length")  # which numpy would not notice
            kept = _kept(tensors["rng_numpy_kept"])
            numpy = "MT19937", numbers, position, int(kept is not None), kept or 0.0
        return cls(tensors.get("rng"), tensors.get("rng_cuda"), python, numpy)


def with_numpys() -> None:
    """Have numpy's generator among them from now on, where numpy is there at all: for code that may draw from it.

    Memory: 3 MB, where torch alone has imported numpy.
    """
    getattr(sys.modules.get("numpy"), "random", None)


def seed_all(seed: int, *, torchs_alone: bool = False) -> None:
    """Seed all of them, or `torchs_alone`, so that what a network draws depends on `seed` alone."""
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would keep its stack for GPUs that are not in use
    if torchs_alone:
        return
    random.seed(seed)
    if (numpy := sys.modules.get("numpy.random")) is not None:
        numpy.seed(seed % 2**32)


def _damaged(error: Exception) -> DamagedFileError:
    return DamagedFileError(f"the random numbers of a checkpoint are damaged: {error}", hint="start a new run")


def _kept(value: Tensor) -> float | None:
    number = float(value)
    return None if number != number else number
