"""What a run is: the one record, `config.json`, that whoever goes on with a run directory reads first."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.data.preprocessing import Preprocessing
from ondevice_trgl.errors import RunDirError
from ondevice_trgl.typed import record_of


@dataclass(frozen=True)
class RunRecord:
    """Settings, data and origin of a run. Plan, blueprint and weights lie beside it in the run directory."""

    config: TrainConfig
    data: Mapping[str, Any]
    """Samples, shape and a digest of the labels of each split, as `outline` gives them."""
    workload: Workload | None = None
    """Model and data by name; None where they are a program's own."""
    subject: Mapping[str, Any] = field(default_factory=dict)
    """Of named data: description, digest, input_shape, num_classes, samples."""
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    """As Preprocessing.to_dict gives it; of a program's own data class names and input shape are known."""
    baseline: str = "skip"
    """auto, measure, full or skip; see Job"""
    command: str = ""
    allocator: str = "system"
    """The setting of the C allocator, for other processes of the run to have the same."""
    stated: str = ""
    """The budget as it was stated: a size, or a policy that is asked again; that of `config` is in bytes, as planned.
    Empty for a function of a program's own."""
    why_budget: str = ""
    """Why the budget is not what was stated, in words; empty where it is."""
    flash_endurance_bytes: int | None = None
    """That the device's flash memory stands to be written, by its profile."""
    no_blueprint: str = ""
    """Why the network has to be built by its own code in each process; empty where it has a blueprint."""

    beside: str = ""
    """The way from the run directory to data in files; empty for other data."""

    @property
    def reported(self) -> dict[str, Any]:
        """What the report says of the work; nothing for a program's own."""
        if self.workload is None:
            return {}
        origin = {"seed": self.config.seed, "baseline": self.baseline, "command": self.command}
        return {**self.workload.to_dict(), **self.subject, **origin, "allocator": self.allocator}

    @property
    def metadata(self) -> dict[str, str] | None:
        """For the header of a safetensors file that holds the trained network."""
        return Preprocessing.from_dict(self.preprocessing).metadata if self.preprocessing else None

    def named(self, path: Path) -> Workload:
        """Model and data by name; data in files that are gone from their place are looked for beside the run.

        Raises RunDirError for a run, in `path`, of a program's own.
        """
        if self.workload is None:
            raise RunDirError(
                f"{path} was made by a program of its own: only that knows its model and data",
                hint="call Trainer.fit(..., resume=True) there",
            )
        kind, _, place = self.workload.data.partition(":")
        moved = path / self.beside
        if self.beside and not os.path.exists(place) and os.path.exists(moved):  # noqa: PTH110 -- False for any name
            return dataclasses.replace(self.workload, data=f"{kind}:{os.path.normpath(moved.absolute())}")
        return self.workload

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON-ready values."""
        workload = None if self.workload is None else self.workload.to_dict()
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "config": self.config.to_dict(), "workload": workload}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunRecord":
        """The inverse of `to_dict`. Raises ValueError, TypeError, LookupError or ConfigError for what is none."""
        config = TrainConfig(**values["config"])
        workload = None if values["workload"] is None else Workload(**values["workload"])
        record = record_of(cls, {**values, "config": config, "workload": workload}, lenient=True)
        if workload is not None and type(record.subject.get("digest")) is not str:
            raise ValueError("subject.digest is missing")
        if record.preprocessing:
            Preprocessing.from_dict(record.preprocessing)  # whoever asks for it later need not expect another
        return record
