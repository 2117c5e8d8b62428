"""A run whose heads are put to use, and which of them is meant: for whoever evaluates or exports it. Imports no torch.

The run may still be training, or have stopped anywhere: what is finished of it is a valid network that exits early, and
reading it disturbs nobody, as files are replaced whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ondevice_trgl.errors import DamagedFileError, RunDirError, UsageError
from ondevice_trgl.model.header import position_in
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.report.model import Report, read_report
from ondevice_trgl.run.measured import Measured
from ondevice_trgl.run.run_dir import PLAN, RunDir
from ondevice_trgl.typed import record_of


@dataclass(frozen=True)
class _Position:
    """Of `run.position`, which imports torch, what is asked here."""

    laps_done: int = 0
    epoch: int = 0
    step: int = 0
    measured: Measured = field(default_factory=Measured)


@dataclass(frozen=True)
class TrainedRun:
    """A run directory with its plan and report. No tensor is read."""

    run: RunDir
    plan: Plan
    report: Report
    heads: Mapping[int, float | None]
    """Of each module with a head that is trained to its end: accuracy on validation data, where there are any."""

    @classmethod
    def open(cls, path: Path) -> "TrainedRun":
        """The run in `path`, completed or not. Raises RunDirError where there is none, or no head of it is finished."""
        run, report = RunDir.open(path), read_report(path)
        plan = run.load(PLAN, Plan.from_dict)
        if report.status == "completed":
            heads = {part.index: part.val_accuracy for part in report.heads if part.train_accuracy is not None}
        else:
            heads = _finished(run, plan)
        if not heads:
            status = "being trained, or was killed" if report.status == "planned" else report.status
            raise RunDirError(
                f"{path} is not finished, its status is {status}, and no module of it is trained to its end yet",
                hint="resume it, or wait until the first module is",
            )
        return cls(run, plan, report, heads)

    @property
    def last(self) -> int:
        """The last module with a head that is finished."""
        return max(self.heads)

    def head(self, head: str | int) -> int:
        """The module whose head `head` names: "best" by validation, "last", or an index. Raises UsageError.

        best: of those that are finished; where validation has chosen none, the last of them. last: the network's own
        classifier.
        """
        count, text = self.plan.num_parts, str(head)
        if text == "best":
            return self._best()
        if text != "last" and (not (text.isascii() and text.isdigit()) or int(text) >= count):
            raise UsageError(f"no head {head!r}: this run has heads 0 to {count - 1}", hint="or best, or last")
        index = count - 1 if text == "last" else int(text)
        if index in self.heads:
            return index
        finished = f"best, or one of {', '.join(map(str, self.heads))}"
        if index < self.plan.passed:
            raise UsageError(
                f"no head {head!r}: module {index} is frozen and passed through, without a head", hint=finished
            )
        if self.report.status == "completed":
            why = f"was not trained: the run stopped behind module {self.last}, as deeper ones no longer helped"
        else:
            why = "is not trained to its end yet"
        raise UsageError(f"no head {head!r}: {self._named(index)} {why}", hint=finished)

    def _best(self) -> int:
        if self.report.status == "completed":
            best = self.report.accuracy.best_head
            return self.last if best is None else best
        known = {index: value for index, value in self.heads.items() if value is not None}
        return self.last if len(known) < len(self.heads) else max(known, key=lambda index: (known[index], index))

    def _named(self, index: int) -> str:
        own = self.plan.classifier and index == self.plan.num_parts - 1
        return "the network's own classifier" if own else f"module {index}"


def _finished(run: RunDir, plan: Plan) -> dict[int, float | None]:
    """Of an unfinished run the modules, from the first on, that are done with one and the same lap; see `heads`.

    In the next lap, as soon as a module was changed, those behind it are of another network. The last counts once the
    whole network is there.
    """
    heads: dict[int, float | None] = {}
    laps = 0
    for index in range(plan.num_parts):
        path = run.modules / f"{index:03d}.safetensors"
        try:
            position = record_of(_Position, position_in(path), lenient=True)
        except ValueError as error:
            raise DamagedFileError(f"{path} is damaged: its position cannot be read: {error}") from None
        own, begun = position.laps_done, position.epoch or position.step
        laps = laps or own
        if not own or own != laps or begun or (index == plan.num_parts - 1 and not run.model.is_file()):
            break
        if index >= plan.passed:
            heads[index] = position.measured.val_accuracy
    return heads
