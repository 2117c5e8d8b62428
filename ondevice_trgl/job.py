"""Job: the record of what the command line was asked for, handed to whoever does it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ondevice_trgl.config import TrainConfig, Workload


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
