"""Budgets that are no number of bytes: "free-RAM minus 500MB", "50% of RAM", or a function of the caller's."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from ondevice_trgl.errors import SizeError
from ondevice_trgl.units import parse_size

Stated = str | int | Callable[[], str | int]
"""A budget as it may be stated: a size, a policy, or a function that gives either each time it is called."""
_POLICY = re.compile(
    r"\s*(?:(?P<share>\d+(?:\.\d+)?)\s*%\s*(?:of\s+)?)?(?P<of>free[-\s]?)?ram\s*(?:(?:minus|-)\s*(?P<less>.+?))?\s*",
    re.IGNORECASE | re.ASCII,
)
_MOST_TEXT = 100
_HINT = 'write a size like 600MB or 2GiB, or a policy like "free-RAM minus 500MB" or "50% of RAM"'


@dataclass(frozen=True)
class Policy:
    """A share of this machine's memory, less some bytes; `free`: of what others leave, not of all."""

    text: str
    share: Decimal
    free: bool
    less: int

    def bytes(self, *, left: int, total: int) -> int:
        """What it comes to where others leave `left` of `total` bytes, at least 1."""
        return max(1, int(self.share * (left if self.free else total)) - self.less)


def parse_budget(stated: str | int, *, what: str = "budget") -> int | Policy:
    """Bytes, or a policy. Raises SizeError, which names the value as `what`."""
    match = _POLICY.fullmatch(stated) if isinstance(stated, str) and len(stated) <= _MOST_TEXT else None
    if match is None:
        try:
            return parse_size(stated, what=what)
        except SizeError as error:
            raise SizeError(error.message, hint=_HINT) from None
    share = Decimal(match["share"]) / 100 if match["share"] else Decimal(1)
    if not 0 < share <= 1:
        raise SizeError(f"{what} {stated!r}: a share of the memory is above 0% and at most 100%", hint=_HINT)
    less = parse_size(match["less"], what=f"{what} {stated!r}:") if match["less"] else 0
    return Policy(str(stated).strip(), share, bool(match["of"]), less)
