"""A run that has trained, and which of its heads is meant: for whoever evaluates or exports it. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from ondevice_trgl.errors import RunDirError, UsageError
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.report.model import Report, read_report
from ondevice_trgl.run.run_dir import PLAN, RunDir


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
        return cls(run, run.load(PLAN, Plan.from_dict), report)

    def head(self, head: str | int) -> int:
        """The module whose head `head` names: "best" by validation, "last", or an index. Raises UsageError.

        Where validation has chosen none, the last is best.
        """
        count, best = self.plan.num_parts, self.report.accuracy.best_head
        text = str(head)
        if text == "best":
            return count - 1 if best is None else best
        if text == "last":
            return count - 1
        if not (text.isascii() and text.isdigit()) or int(text) >= count:
            raise UsageError(f"no head {head!r}: this run has heads 0 to {count - 1}", hint="or best, or last")
        if self.report.heads[int(text)].passed:
            first = next(module.index for module in self.report.heads if not module.passed)
            raise UsageError(
                f"no head {head!r}: module {text} is frozen and passed through, without a head",
                hint=f"the first head is {first}; or best, or last",
            )
        return int(text)
