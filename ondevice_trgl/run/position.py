"""Where a module of a run stands: what its checkpoint holds beside tensors."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ondevice_trgl.errors import DamagedFileError
from ondevice_trgl.model.store import ModuleStore
from ondevice_trgl.plan.plan import Rung, rung_within
from ondevice_trgl.run.measured import Measured
from ondevice_trgl.trgl.step import Tally
from ondevice_trgl.typed import record_of


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

    def way(self, ladder: Sequence[Rung], room: int) -> Rung:
        """The way it was trained, where that is one of `ladder`; else the first that fits into `room` bytes."""
        return self.rung if self.rung is not None and self.rung in ladder else rung_within(ladder, room)

    @classmethod
    def of(cls, store: ModuleStore, index: int) -> "Position":
        """Of module `index` as it is saved; no tensor is read. Raises DamagedFileError."""
        try:
            return cls.from_dict(store.position(index))
        except ValueError as error:
            raise DamagedFileError(f"{store.path(index)} is damaged: its position is none: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Position":
        """The inverse of `to_dict`; an empty mapping is the start. Raises ValueError for what is none."""
        position = record_of(cls, values)
        if min(position.laps_done, position.epoch, position.step, position.saves, position.written_bytes) < 0:
            raise ValueError("it counts below zero")
        return position
