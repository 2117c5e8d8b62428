"""Whether the sitting before was killed for want of memory: then what it was at goes on with less.

A file stands in the run directory while a sitting trains, with what the kernel had counted when it began. Whatever ends
a sitting removes it; where it is still there the process was killed, and if the kernel has killed for want of memory
since, that is taken to be why.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ondevice_trgl.device.container import boot, oom_kills
from ondevice_trgl.errors import DamagedFileError
from ondevice_trgl.plan.plan import Plan, Rung
from ondevice_trgl.run.run_dir import SITTING, RunDir
from ondevice_trgl.typed import record_of


@dataclass(frozen=True)
class _Left:
    """What is in the file. `rungs`: place in its ladder of each module that was at work, by its index."""

    boot: str
    oom_kills: int
    lap: int = 0
    rungs: Mapping[str, int] = field(default_factory=dict)


class Sitting:
    """This one's file in `run`."""

    def __init__(self, run: RunDir, plan: Plan) -> None:
        self._run, self._plan = run, plan
        self._boot, self._kills = boot(), oom_kills()

    def at(self, lap: int, rungs: Mapping[int, Rung]) -> None:
        """These modules are at work, on these rungs. Raises StorageError."""
        if self._kills is None:
            return  # the system counts nothing
        places = {str(index): self._plan.ladders[index].index(rung) for index, rung in rungs.items()}
        left = _Left(self._boot, self._kills, lap, places)
        self._run.write(SITTING, vars(left))

    def end(self) -> None:
        """It is over, and nothing has killed it."""
        with contextlib.suppress(OSError):
            (self._run.path / SITTING).unlink(missing_ok=True)

    def killed_for_memory(self) -> tuple[int, dict[int, Rung]] | None:
        """Of a sitting before that was: its lap, and the rungs of the modules that were at work."""
        if self._kills is None or not (self._run.path / SITTING).is_file():
            return None
        try:
            left: _Left = record_of(_Left, self._run.read(SITTING))
            rungs: dict[int, Any] = {int(k): self._plan.ladders[int(k)][place] for k, place in left.rungs.items()}
        except (DamagedFileError, ValueError, LookupError):
            return None  # the power was cut
        was_killed = left.boot == self._boot and left.oom_kills < self._kills
        return (left.lap, rungs) if was_killed and rungs else None
