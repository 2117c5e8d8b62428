"""What is in memory beside the module at work, where all modules take turns at every batch (parallel schedule)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ondevice_trgl.plan.costs import Costs


@dataclass(frozen=True)
class Others:
    """Bytes that stay in memory from batch to batch."""

    kept: tuple[tuple[int, int], ...] = ()
    """Of each module, by its first segment: weights, buffers and optimizer state, its head's with them."""
    relay: int = 0
    """The batch between two modules, as one reads it and as the other puts it out."""

    def than(self, start: int) -> int:
        """Beside what the module that begins with segment `start` takes by itself; 0 for one that trains alone."""
        return self.handed(start) + self.still(start)

    def handed(self, start: int) -> int:
        """Of those the batch between two modules."""
        return self.relay if start in dict(self.kept) else 0

    def still(self, start: int) -> int:
        """Of those what belongs to other modules."""
        return sum(size for first, size in self.kept if first != start) if start in dict(self.kept) else 0


NO_OTHERS = Others()


def others_of(bounds: Sequence[int], costs: Costs, batch: int) -> Others:
    """Of the modules between `bounds`, those that take turns, at `batch` samples a step."""
    kept = tuple((start, costs.kept_bytes(start, stop)) for start, stop in pairwise(bounds))
    widest = max((costs.output_bytes[stop - 1] for stop in bounds[1:-1]), default=0)
    return Others(kept, 2 * batch * widest)
