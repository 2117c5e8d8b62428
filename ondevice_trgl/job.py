"""What is asked for by name, as records that pass as JSON: a training, a baseline to measure."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ondevice_trgl.config import IN_FILES, TrainConfig, Workload

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
    """auto: measure end-to-end where it is predicted to fit in what is free; measure: in any case; full: train it to
    the end, for its accuracy; skip"""
    command: str = ""
    stated: str = ""
    """The budget as it was stated; that of `config` is in bytes, as of when the job began."""
    why_budget: str = ""
    """Why the two differ, in words; empty where they do not."""
    flash_endurance_bytes: int | None = None
    """That the device's flash memory stands to be written, by its profile."""
    allocator: str = "system"
    """The settings of the C allocator that the caller has made, for child processes to have the same."""

    def within(self, config: TrainConfig, stated: str, why: str) -> "Job":
        """This job with the budget of `config`, as it was `stated`, and why the two differ."""
        return dataclasses.replace(self, config=config, stated=stated, why_budget=why)

    def located(self) -> "Job":
        """This job with paths that hold wherever a process of it is started: those of data, weights and cache."""
        work, config = self.workload, self.config
        work = dataclasses.replace(
            work, data=_located(work.data), data_root=_absolute(work.data_root), weights=_absolute(work.weights)
        )
        config = dataclasses.replace(config, cache_dir=_absolute(config.cache_dir))
        return dataclasses.replace(self, workload=work, config=config)

    @property
    def beside(self) -> str:
        """The way from the run directory to data in files, which holds when both are moved; empty for other data."""
        kind, _, path = self.workload.data.partition(":")
        return os.path.relpath(Path(path).expanduser(), self.run_dir) if kind in IN_FILES and path else ""

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
            "flash_endurance_bytes": self.flash_endurance_bytes,
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


def _located(data: str) -> str:
    kind, colon, path = data.partition(":")
    return f"{kind}:{_absolute(path)}" if kind in IN_FILES and colon and path else data


def _absolute(path: str | Path | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


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
    full: bool = False
    """Train as many epochs as a module of the run, at its learning rates, and judge the outcome."""
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
