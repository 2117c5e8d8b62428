"""What the bytes of a predicted peak are for."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Breakdown:
    """Bytes by their purpose, at the moment when their sum is largest."""

    weights: int = 0
    """Of the module: parameters and buffers."""
    gradients: int = 0
    """Of the module's parameters."""
    optimizer: int = 0
    """What the optimizer keeps for the module's parameters from step to step."""
    activations: int = 0
    """Input buffer, what is saved for the backward pass, gradients of it; boundaries that are cached in memory."""
    head: int = 0
    """The auxiliary head: its weights, their gradients and optimizer state, its activations."""
    others: int = 0
    """Weights and optimizer state of the modules that are not at work, where they stay in memory (parallel)."""
    scratch: int = 0
    """What kernels, their code and the allocator take beside the tensors."""
    floor: int = 0
    """What the process holds before it loads the module."""

    @property
    def total(self) -> int:
        """The peak."""
        return sum(dataclasses.astuple(self))

    @property
    def still(self) -> int:
        """What does not change with the batch, and lies in memory of its own size."""
        return self.weights + self.gradients + self.optimizer

    def with_total(self, total: int, *, floor: int = 0) -> "Breakdown":
        """These tensors as part of a peak of `total` bytes, `floor` of them the floor: the rest is scratch.

        Where tensors were overestimated, activations are what gives way, the least certain of them.
        """
        tensors = dataclasses.replace(self, scratch=0, floor=0)
        rest = total - floor - tensors.total
        if rest >= 0:
            return dataclasses.replace(tensors, scratch=rest, floor=floor)
        return dataclasses.replace(tensors, activations=tensors.activations + rest, floor=floor)
