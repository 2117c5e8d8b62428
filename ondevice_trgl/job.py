"""What is asked for by name, as records that pass as JSON: a training, a baseline to measure."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ondevice_trgl.config import TrainConfig, Workload

ACCUMULATE = 4
"""Micro-batches a step of the baseline that accumulates, where nobody says otherwise."""


@dataclass(frozen=True)
class Job:
    """A workload, how to train it, and where the run goes."""

    workload: Workload
    config: TrainConfig
    run_dir: Path
    force: bool = False
    baseline: str = "auto"
    """auto: measure end-to-end where it is predicted to fit in what is free; measure: in any case; skip"""
    command: str = ""
    stated: str = ""
    """The budget as it was stated; that of `config` is in bytes, as of when the job began."""
    why_budget: str = ""
    """Why the two differ, in words; empty where they do not."""
    allocator: str = "system"
    """The settings of the C allocator that the caller has made, for child processes to have the same."""

    def within(self, config: TrainConfig, stated: str, why: str) -> "Job":
        """This job with the budget of `config`, as it was `stated`, and why the two differ."""
        return dataclasses.replace(self, config=config, stated=stated, why_budget=why)

    def to_dict(self) -> dict[str, Any]:
        """The job as JSON-ready values."""
        return {
            "workload": self.workload.to_dict(),
            "config": self.config.to_dict(),
            "run_dir": str(self.run_dir),
            "force": self.force,
            "baseline": self.baseline,
            "command": self.command,
            "stated": self.stated,
            "why_budget": self.why_budget,
            "allocator": self.allocator,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Job":
        """The inverse of `to_dict`."""
        parts = {
            "workload": Workload(**record["workload"]),
            "config": TrainConfig(**record["config"]),
            "run_dir": Path(record["run_dir"]),
        }
        return cls(**{**record, **parts})


@dataclass(frozen=True, kw_only=True)
class BaselineRequest:
    """End-to-end training, to be measured by a process of its own; its answer is a BaselineReport."""

    name: str
    """plain (to be asked of a process that is not lean, in a plain environment), or tuned as the module-wise run is:
    e2e, e2e_accumulate, e2e_checkpoint"""
    workload: Workload
    config: TrainConfig
    batch_size: int
    scratch_dir: Path
    allocator: str = "system"
    accumulate: int = 1
    """Micro-batches that a batch is cut into; where it does not divide, the most that it can be cut into below that."""

    def micro_batch(self, batch_size: int, least: int = 1) -> int:
        """Samples in memory at once, of batches that have `batch_size`: `least` or more, where those have."""
        counts = (count for count in range(1, self.accumulate + 1) if batch_size % count == 0)
        return batch_size // max(count for count in counts if count == 1 or batch_size // count >= least)

    def to_dict(self) -> dict[str, Any]:
        """The request as JSON-ready values."""
        parts = {"workload": self.workload.to_dict(), "config": self.config.to_dict()}
        return {**vars(self), **parts, "scratch_dir": str(self.scratch_dir)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BaselineRequest":
        """The inverse of `to_dict`."""
        parts = {"workload": Workload(**values["workload"]), "config": TrainConfig(**values["config"])}
        return cls(**{**values, **parts, "scratch_dir": Path(values["scratch_dir"])})
