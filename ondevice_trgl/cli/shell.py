"""What a command may do to the terminal: data to stdout, everything else to stderr."""

import json
import shutil
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ondevice_trgl.errors import BudgetInfeasibleError, TrglError
from ondevice_trgl.report.table import Line, plain

PROGRAM = "trgl-device"
_STYLES = {"": "", "title": "bold", "good": "green", "bad": "bold red", "dim": "dim"}


@dataclass
class Shell:
    """The two streams, as the output flags want them."""

    command: str
    """The command line as it was typed, to be reproduced."""
    json: bool = False
    quiet: bool = False
    verbose: bool = False
    no_color: bool = False
    own_process: bool = False
    """The process is the command's own: it may be started again with another allocator."""

    @property
    def width(self) -> int:
        """Columns to fill: the terminal's, COLUMNS, or 100."""
        return shutil.get_terminal_size((100, 24)).columns

    def lines(self, lines: Iterable[Line]) -> None:
        """Lines of data to stdout, in colour on a terminal."""
        if not sys.stdout.isatty():
            self.text("\n".join(plain(lines)))
            return
        from rich.console import Console
        from rich.text import Text

        console = Console(no_color=self.no_color or None, highlight=False, soft_wrap=True)
        for line in lines:
            console.print(Text.assemble(*((_writable(span.text), _STYLES[span.tone]) for span in line)))

    def text(self, text: str) -> None:
        """Plain text to stdout; what its encoding lacks is escaped."""
        print(_writable(text))

    def record(self, record: Mapping[str, Any]) -> None:
        """The one JSON object of stdout."""
        print(json.dumps(record, indent=2, default=str))

    def note(self, text: str) -> None:
        """A line for people, to stderr unless --quiet."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def complain(self, message: str, *, hint: str = "", code: int) -> int:
        """An error with its way out, to stderr even with --quiet; returns `code`."""
        print(f"error: {message}" + (f"\nhint: {hint}" if hint else ""), file=sys.stderr, flush=True)
        return code

    def fail(self, error: TrglError) -> int:
        """An error of this package: its line on stderr, with --json its record on stdout; returns its exit code."""
        if self.verbose:
            traceback.print_exception(error)
        if self.json:
            self.record(_error_record(error))
        return self.complain(error.message, hint=error.hint, code=error.exit_code)

    def crash(self, error: Exception) -> int:
        """An error that nobody foresaw; returns 1."""
        if self.verbose:
            traceback.print_exception(error)
        if self.json:
            self.record({"status": "failed", "error": type(error).__name__, "message": str(error)})
        name = type(error).__name__
        return self.complain(f"{name}: {error}", hint="" if self.verbose else "-v shows the traceback", code=1)


def _writable(text: str) -> str:
    """`text` with what the encoding of stdout lacks escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _error_record(error: TrglError) -> dict[str, Any]:
    record = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    if isinstance(error, BudgetInfeasibleError):
        return {
            "status": "infeasible",
            "smallest_feasible_budget_bytes": error.smallest_feasible_budget_bytes,
            "budget_bytes": error.budget_bytes,
            **record,
        }
    return {"status": "failed", **record}
