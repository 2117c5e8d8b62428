"""A run that has trained, and which of its heads is meant: for whoever evaluates or exports it."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ondevice_trgl.errors import RunDirError, StorageError, UsageError
from ondevice_trgl.model.blueprint import from_blueprint
from ondevice_trgl.model.filed import weights_in_file
from ondevice_trgl.model.store import evict
from ondevice_trgl.model.trace import Chain, trace
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.report.model import Report, read_report
from ondevice_trgl.run.prepare import BLUEPRINT
from ondevice_trgl.run.run_dir import SCRATCH, RunDir


@dataclass(frozen=True)
class TrainedRun:
    """A run directory with its plan and report. No tensor is read."""

    run: RunDir
    plan: Plan
    report: Report

    @classmethod
    def open(cls, path: Path, *, finished: bool = True) -> "TrainedRun":
        """The run in `path`. Raises RunDirError where there is none; with `finished`, where it has not ended."""
        run, report = RunDir.open(path), read_report(path)
        if finished and report.status != "completed":
            raise RunDirError(f"{path} is not finished, its status is {report.status}", hint="resume it first")
        return cls(run, Plan.from_dict(run.read("plan.json")), report)

    def head(self, head: str | int) -> int:
        """The module whose head `head` names: "best" by validation, "last", or an index. Raises UsageError.

        Where validation has chosen none, the last is best.
        """
        count, best = self.plan.num_modules, self.report.accuracy.best_head
        text = str(head)
        if text == "best":
            return count - 1 if best is None else best
        if text == "last":
            return count - 1
        if not (text.isascii() and text.isdigit()) or int(text) >= count:
            raise UsageError(f"no head {head!r}: this run has heads 0 to {count - 1}", hint="or best, or last")
        return int(text)

    def chain(self, build: Callable[[], nn.Module], in_shape: tuple[int, ...], scratch: Path) -> Chain:
        """The network, evicted: from its blueprint or, where it has none, from `build` with its weights in a file.

        Raises DamagedFileError, and what `build` raises.
        """
        if (self.run.path / BLUEPRINT).is_file():
            return from_blueprint(self.run.read(BLUEPRINT))
        with weights_in_file(scratch) as filed:
            model = build()
            filed.take(model)
            with filed.dropped_as_read():
                chain = trace(model, torch.zeros(2, *in_shape))
        evict(model)
        return chain

    @contextlib.contextmanager
    def scratch(self, cache_dir: str | Path | None) -> Iterator[Path]:
        """A folder for the time of the context, in `cache_dir` if that is there, else in the run. Raises StorageError.

        Not that of the run's own cache: two may evaluate one run at a time.
        """
        place = Path(cache_dir) if cache_dir is not None and Path(cache_dir).is_dir() else self.run.path
        try:
            folder = tempfile.TemporaryDirectory(prefix=SCRATCH, dir=place)
        except OSError as error:
            raise StorageError(
                f"{place} cannot be written: {error.strerror}", hint="copy the run to a folder that can"
            ) from error
        with folder as path:
            yield Path(path)
