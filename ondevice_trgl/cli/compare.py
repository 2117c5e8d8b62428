"""`trgl-device compare`: TRGL beside end-to-end training, all of it measured."""

from typing import TYPE_CHECKING, Any

from ondevice_trgl.cli.settings import make_job, origin_lines, resolve_settings
from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.cli.signals import PauseOnSignal
from ondevice_trgl.errors import BudgetExceededError, BudgetInfeasibleError, UsageError
from ondevice_trgl.report.comparison import Comparison, comparison_lines
from ondevice_trgl.report.table import plain
from ondevice_trgl.units import parse_size

if TYPE_CHECKING:
    from ondevice_trgl.compare import AskIn


def run_compare(shell: Shell, given: dict[str, Any], ask: "AskIn | None" = None) -> int:
    """Measure plain, tuned, accumulated and checkpointed end-to-end training beside TRGL at one budget or several."""
    written = [text for many in given["budgets"] or () for text in many.split(",")]
    accumulate, repeat = (_whole(name, given[name]) for name in ("accumulate", "repeat"))
    for text in written:
        parse_size(text, what="--budget")
    resolved = resolve_settings({**given, "budget": written[0] if written else None})
    assert resolved.config.budget is not None
    if shell.verbose:
        shell.note("\n".join(plain(origin_lines(resolved, shell.width))))
    # not started again like other commands: what it measures starts from the environment as the caller has it
    from ondevice_trgl.compare import compare

    job = make_job({**given, "baseline": "skip"}, resolved, command=shell.command)
    with PauseOnSignal():  # a signal ends it with its scratch files gone
        comparison = compare(
            job,
            written or [resolved.config.budget],
            keep=given["run_dir"] is not None,
            accumulate=accumulate,
            repeat=repeat,
            say=shell.note if given["progress"] != "none" else lambda line: None,
            **({"ask": ask} if ask else {}),
        )
    if shell.json:
        shell.record(comparison.to_dict())
    else:
        shell.lines(comparison_lines(comparison, shell.width))
    return exit_code(comparison)


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{name} = {text!r}: expected a whole number", hint=f"for example --{name} 3") from None


def exit_code(comparison: Comparison) -> int:
    """0 where TRGL was measured, 4 where it went over a budget, 3 where every budget is infeasible, else 1."""
    rows = [row for row in comparison.rows if row.budget_bytes is not None]
    if any(row.is_over for row in rows):
        return BudgetExceededError.exit_code
    if any(row.is_measured for row in rows):
        return 0
    refused = all(row.last is not None and row.last.status == "refused" for row in rows)
    return BudgetInfeasibleError.exit_code if refused else 1
