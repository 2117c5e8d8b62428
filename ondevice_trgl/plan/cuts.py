"""Where a module can end: where activations are float32, as heads take them and caches keep them."""

from collections.abc import Sequence

import torch

from ondevice_trgl.errors import PartitionError
from ondevice_trgl.model.trace import Chain


def can_end(chain: Chain, stop: int) -> bool:
    """Whether a module can end in front of segment `stop`."""
    return stop == len(chain.segments) or _dtype(chain, stop) == torch.float32


def can_be_cut(chain: Chain, bounds: Sequence[int]) -> bool:
    """Whether every module can end where `bounds` has it end."""
    return all(can_end(chain, stop) for stop in bounds[1:-1])


def no_cut(chain: Chain, bounds: Sequence[int]) -> PartitionError:
    """The refusal of `bounds`, which names the first place that cannot be."""
    stop = next(stop for stop in bounds[1:-1] if not can_end(chain, stop))
    return PartitionError(
        f"activations behind {chain.segments[stop - 1].name} are {_dtype(chain, stop)}; a module can end where they "
        "are torch.float32",
        hint="cast them there (.float()), or train with --modules 1",
    )


def _dtype(chain: Chain, stop: int) -> torch.dtype:
    found: torch.dtype = chain.segments[stop - 1].output.meta["dtype"]
    return found
