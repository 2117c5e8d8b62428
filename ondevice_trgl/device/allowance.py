"""How much may be taken now: the budget as it was stated, asked anew, and never more than the container's limit."""

from collections.abc import Callable

from ondevice_trgl.device.container import memory_limit_bytes
from ondevice_trgl.device.host import left_bytes, usable_ram_bytes
from ondevice_trgl.errors import BudgetInfeasibleError
from ondevice_trgl.policy import Policy, Stated, parse_budget
from ondevice_trgl.units import format_size

_PAGE_BYTES = 1 << 16
"""Limits are kept in whole pages: one that is less than this below the budget is the budget."""
_GRAIN = 64
"""A policy's answers are rounded down to this part of themselves: what is free changes with every page."""


class Allowance:
    """What this process and those it starts may take on CPU. `limit`, `left` and `total` look at the machine."""

    def __init__(
        self,
        stated: Stated,
        *,
        limit: Callable[[], int | None] = memory_limit_bytes,
        left: Callable[[], int] = left_bytes,
        total: Callable[[], int] = usable_ram_bytes,
    ) -> None:
        self.stated, self._limit, self._left, self._total = stated, limit, left, total

    @property
    def text(self) -> str:
        """The budget as it can be stated again; of a function, nothing."""
        return "" if callable(self.stated) else str(self.stated)

    def now(self) -> int:
        """In bytes. Raises SizeError for what cannot be read, and what a function of the caller's raises."""
        asked, limit = self._asked(), self._limit()
        return limit if limit is not None and limit + _PAGE_BYTES < asked else asked

    def why(self) -> str:
        """Where the budget is less than what was stated, or was not stated in bytes: a sentence for people."""
        asked, now = self._asked(), self.now()
        if now < asked:
            return f"budget {format_size(now)}: the container's limit, which is below the {format_size(asked)} stated"
        if callable(self.stated):
            return f"budget {format_size(now)}: what the program's own function gives now; asked between steps"
        if isinstance(parse_budget(self.stated), Policy):
            return f"budget {format_size(now)}: {self.stated}, as of now; asked again between steps"
        return ""

    def refused(self, error: BudgetInfeasibleError) -> BudgetInfeasibleError:
        """`error` with the container's limit in it, where that is what nothing fits into."""
        limit = self._limit()
        if limit is None or limit >= error.smallest_feasible_budget_bytes:
            return error
        where = f"this container is limited to {format_size(limit)}"
        stated = "" if callable(self.stated) else f", whatever the budget of {self.stated}"
        return BudgetInfeasibleError(
            f"{error.message}; {where}{stated}",
            budget_bytes=error.budget_bytes,
            smallest_feasible_budget_bytes=error.smallest_feasible_budget_bytes,
            hint=f"{error.hint}; a larger budget needs a container with a larger limit",
        )

    def _asked(self) -> int:
        stated = self.stated() if callable(self.stated) else self.stated
        asked = parse_budget(stated)
        if isinstance(asked, int):
            return asked
        size = asked.bytes(left=self._left(), total=self._total())
        return max(1, size - size % max(1, size // _GRAIN))
