"""Every error that this package raises on purpose, and the exit code that the command line gives it.

TrglError                     1   anything below; catch this to catch them all
├── UsageError                2   something the caller wrote is wrong
│   ├── ConfigError           2   one or more faults in a configuration, all listed at once
│   ├── SizeError             2   a byte size that cannot be read, or is not positive
│   ├── UnknownNameError      2   a model, dataset, profile, head ... that does not exist
│   ├── RunDirError           2   a run directory that is taken, unwritable, locked or not a run
│   └── DataError             2   a dataset that is absent, empty or malformed
├── PartitionError            2   a network that cannot be cut as asked
├── BudgetInfeasibleError     3   no plan fits the budget (raised before training)
├── BudgetExceededError       4   the budget could not be held while training; the run can be resumed
├── ProcessDiedError          1   a short-lived process of ours ended without an answer
├── NonFiniteError            1   NaN or infinity in the data or in the loss; the run can be resumed
└── StorageError              1   the disk failed or is full; the run can be resumed
    └── DamagedFileError      1   a file is torn, foreign or altered

A message names the bad value, what was expected, and the way out.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class TrglError(Exception):
    """Base of all errors of this package."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message}\n  hint: {hint}" if hint else message)
        self.message = message
        self.hint = hint


class UsageError(TrglError):
    """Something the caller wrote is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """All faults of a configuration at once; `faults` holds one sentence each."""

    def __init__(self, faults: Sequence[str], *, source: str = "", hint: str = "") -> None:
        self.faults = tuple(faults)
        where = f" in {source}" if source else ""
        plural = "fault" if len(self.faults) == 1 else "faults"
        lines = "\n".join(f"  - {fault}" for fault in self.faults)
        super().__init__(f"{len(self.faults)} {plural}{where}:\n{lines}", hint=hint)


class SizeError(UsageError):
    """A byte size that cannot be read, or is not positive."""


class UnknownNameError(UsageError):
    """A name that does not exist; the message suggests the nearest and lists the valid ones."""

    def __init__(self, kind: str, name: str, valid: Iterable[str], *, hint: str = "") -> None:
        names = sorted(valid)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        near = near or [known for known in names if name and known.startswith(name)][:3]
        suggestion = f"; did you mean {' or '.join(near)}?" if near else ""
        self.kind, self.name, self.suggestions = kind, name, tuple(near)
        super().__init__(f"unknown {kind} {name!r}{suggestion}\n  valid: {', '.join(names)}", hint=hint)


class RunDirError(UsageError):
    """A run directory that is taken, unwritable, locked or not a run."""


class DataError(UsageError):
    """A dataset that is absent, empty or malformed."""


class PartitionError(TrglError):
    """A network that cannot be cut as asked."""

    exit_code = 2


class BudgetInfeasibleError(TrglError):
    """No plan fits the budget. Raised before training; nothing was changed on disk.

    `budget_bytes` was asked for; `smallest_feasible_budget_bytes` is the least that a plan was found for.
    """

    exit_code = 3

    def __init__(self, message: str, *, budget_bytes: int, smallest_feasible_budget_bytes: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.budget_bytes = budget_bytes
        self.smallest_feasible_budget_bytes = smallest_feasible_budget_bytes


class BudgetExceededError(TrglError):
    """The budget could not be held while training. The run directory can be resumed."""

    exit_code = 4


class ProcessDiedError(TrglError):
    """A process of ours ended without an answer. `returncode` is negative where a signal ended it."""

    def __init__(self, message: str, *, returncode: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.returncode = returncode


class NonFiniteError(TrglError):
    """NaN or infinity in the data or in the loss. The run directory can be resumed."""


class StorageError(TrglError):
    """The disk failed or is full. The run directory can be resumed."""


class DamagedFileError(StorageError):
    """A file is torn, foreign or altered."""


def to_record(error: TrglError) -> dict[str, Any]:
    """`error` as JSON-ready values, to be handed from one process to another."""
    return {"class": type(error).__name__, "text": str(error), "own": dict(vars(error))}


def from_record(record: Mapping[str, Any]) -> TrglError:
    """The error that `to_record` recorded; a class that this process does not have becomes a TrglError."""
    found = globals().get(record["class"])
    kind = found if isinstance(found, type) and issubclass(found, TrglError) else TrglError
    error = kind.__new__(kind)
    Exception.__init__(error, record["text"])
    vars(error).update(record["own"])
    return error


def first_line(error: BaseException) -> str:
    """What `error` says, as far as it fits into a message of ours; its class where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0] if said else type(error).__name__
