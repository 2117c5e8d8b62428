"""What the processes that set a run up are asked for; each record passes as JSON. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ondevice_trgl.errors import BudgetInfeasibleError
from ondevice_trgl.job import Job
from ondevice_trgl.units import format_size


@dataclass(frozen=True)
class StageRequest:
    """Make the model and data that `job` names, and stage them in `folder`."""

    job: Job
    folder: Path
    caller_bytes: int
    """What the processes hold that wait for the answer."""
    weights: bool = True
    """Whether the weights are wanted, which a plan alone does without."""

    def to_dict(self) -> dict[str, Any]:
        """The request as JSON-ready values."""
        return {**vars(self), "job": self.job.to_dict(), "folder": str(self.folder)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StageRequest":
        """The inverse of `to_dict`."""
        return cls(**{**values, "job": Job.from_dict(values["job"]), "folder": Path(values["folder"])})


@dataclass(frozen=True)
class PlanRequest:
    """Plan what is staged in `folder`, within the budget that its record names."""

    folder: Path
    caller_bytes: int
    caller_modules: Sequence[str] = ()
    """Modules that the caller has imported: it will hold them when it trains."""
    floor_bytes: int | None = None
    """What the process that will train holds before its first module; None: as this one does."""
    set_up_bytes: int = 0
    """What staging took at most."""

    def to_dict(self) -> dict[str, Any]:
        """The request as JSON-ready values."""
        return {**vars(self), "folder": str(self.folder), "caller_modules": list(self.caller_modules)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PlanRequest":
        """The inverse of `to_dict`."""
        return cls(**{**values, "folder": Path(values["folder"])})


@dataclass(frozen=True)
class Took:
    """The answer to both: what was made lies in the folder, and this is what it took."""

    peak_bytes: int
    """Highest of the process and its callers together; 0 where the memory of a device is metered."""


def too_large(budget: int, peak: int) -> BudgetInfeasibleError:
    """The refusal of a budget that setting a run up does not fit into; `peak` is what was reached, or asked for."""
    needed = -(-max(peak, budget) * 103 // 100 // 1_000_000) * 1_000_000
    return BudgetInfeasibleError(
        f"nothing fits the budget of {format_size(budget)}: building and planning need "
        f"{format_size(max(peak, budget))} or more",
        budget_bytes=budget,
        smallest_feasible_budget_bytes=needed,
        hint=f"the smallest feasible budget is {needed // 1_000_000}MB or more",
    )
