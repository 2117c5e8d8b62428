"""Where a module of a run stands: what its checkpoint holds beside tensors."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ondevice_trgl.plan.plan import Rung
from ondevice_trgl.run.measured import Measured
from ondevice_trgl.trgl.step import Tally


@dataclass(frozen=True)
class Position:
    """`laps_done` laps are behind the module; of the one after, `epoch` epochs and `step` steps of the next."""

    laps_done: int = 0
    epoch: int = 0
    step: int = 0
    measured: Measured = field(default_factory=Measured)
    tally: Tally = field(default_factory=Tally)
    """Of the epoch that was begun."""
    rung: Rung | None = None
    """The way it was trained; None where that is the plan's."""
    saves: int = 0
    """Checkpoints that the run had made with this one: the highest is the latest."""
    written_bytes: int = 0
    """That the run had written to disk before this checkpoint, by all sittings."""
    callbacks: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    """Name and state of each callback with the run."""

    @property
    def is_begun(self) -> bool:
        """Whether the module stands in the middle of a lap."""
        return bool(self.epoch or self.step)

    def to_dict(self) -> dict[str, Any]:
        """The position as JSON-ready values."""
        rung = None if self.rung is None else dataclasses.asdict(self.rung)
        return {**vars(self), "measured": vars(self.measured), "tally": vars(self.tally), "rung": rung}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Position":
        """The inverse of `to_dict`; an empty mapping is the start."""
        parts = {
            "measured": Measured(**values.get("measured", {})),
            "tally": Tally(**values.get("tally", {})),
            "rung": Rung(**values["rung"]) if values.get("rung") else None,
            "callbacks": tuple((name, state) for name, state in values.get("callbacks", ())),
        }
        return cls(**{**values, **parts})
