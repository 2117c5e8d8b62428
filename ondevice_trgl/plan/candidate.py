"""A way to cut a network into modules, and to train each."""

from dataclasses import dataclass

from ondevice_trgl.plan.plan import Rung


@dataclass(frozen=True)
class Candidate:
    """Modules, and the ladder of each."""

    bounds: tuple[int, ...]
    ladders: tuple[tuple[Rung, ...], ...]

    @property
    def least(self) -> int:
        """Predicted peak of the whole process, every module on its last rung."""
        return max(ladder[-1].peak_bytes for ladder in self.ladders)
