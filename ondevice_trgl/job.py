"""Job: the record of what the command line was asked for, handed to whoever does it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.errors import RunDirError


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
    allocator: str = "system"
    """The settings of the C allocator that the caller has made, for child processes to have the same."""

    def to_dict(self) -> dict[str, Any]:
        """The job as JSON-ready values."""
        return {
            "workload": self.workload.to_dict(),
            "config": self.config.to_dict(),
            "run_dir": str(self.run_dir),
            "force": self.force,
            "baseline": self.baseline,
            "command": self.command,
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

    @classmethod
    def of_run(cls, run_dir: Path, record: Mapping[str, Any]) -> "Job":
        """The job that made the run in `run_dir`, from its config.json. Raises RunDirError for one of the library's."""
        workload: Mapping[str, Any] = record["workload"]
        if "model" not in workload:
            raise RunDirError(
                f"{run_dir} was made by a program of its own: only that knows its model and data",
                hint="call Trainer.fit(..., resume=True) there",
            )
        known = {f.name: workload[f.name] for f in fields(Workload) if f.name in workload}
        return cls(
            Workload(**known),
            TrainConfig(**record["config"]),
            run_dir,
            baseline=workload["baseline"],
            command=workload["command"],
            allocator=workload["allocator"],
        )
