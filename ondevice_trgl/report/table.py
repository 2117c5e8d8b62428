"""Tables and lines of text with tones; no colour, no terminal, only ASCII of its own.

Every piece of text carries a tone ("title", "good", "bad", "dim" or ""), so that a terminal can colour it; `plain`
leaves the tones out.
"""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

ABSENT = "-"


class Span(NamedTuple):
    """A piece of text with a tone: title | good | bad | dim | empty."""

    text: str
    tone: str = ""


Line = tuple[Span, ...]
Cell = Span | str | None


@dataclass(frozen=True)
class Table:
    """Rows of spans under headings; `right` says which columns are figures."""

    title: str
    headings: tuple[str, ...]
    right: tuple[bool, ...]
    rows: tuple[tuple[Span, ...], ...]


def make_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Table:
    """A Table whose absent cells (None) read "-"; a column in which every cell is absent is left out.

    A heading that starts with "<" is that of a column of words (aligned left).
    """
    body = [list(row) for row in rows]
    kept = [i for i in range(len(headings)) if not body or any(row[i] is not None for row in body)]
    return Table(
        title=title,
        headings=tuple(headings[i].removeprefix("<") for i in kept),
        right=tuple(not headings[i].startswith("<") for i in kept),
        rows=tuple(tuple(_span(row[i]) for i in kept) for row in body),
    )


def _span(cell: Cell) -> Span:
    if cell is None:
        return Span(ABSENT, "dim")
    return cell if isinstance(cell, Span) else Span(cell)


def format_fraction(value: float | None) -> str | None:
    """A fraction from 0 to 1 as a percentage."""
    return None if value is None else f"{100 * value:.1f}%"


def format_seconds(seconds: float | None) -> str | None:
    """Seconds as people read them, coarser as they grow."""
    if seconds is None:
        return None
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02}m"


def format_count(number: int) -> str:
    """A count in thousands or millions."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}" if number < 999.5 * limit else f"{number / limit:.0f}{suffix}"
    return str(number)


def labelled(name: str, text: str, width: int, *, hang: int = 0) -> list[Line]:
    """`text` wrapped beside its name; `hang` indents the lines after the first."""
    parts = textwrap.wrap(text, max(width - 10, 20), subsequent_indent=" " * hang) or [""]
    return [(Span(f"{name if i == 0 else '':<10}", "dim"), Span(part)) for i, part in enumerate(parts)]


def wrapped(span: Span, width: int) -> list[Line]:
    """One span over as many lines as it needs."""
    return [(Span(part, span.tone),) for part in textwrap.wrap(span.text, max(width, 20))]


def table_lines(table: Table, width: int) -> list[Line]:
    """A table as aligned lines; where it is wider than `width`, the longest column of words is cut."""
    cells = [tuple(Span(heading, "dim") for heading in table.headings), *table.rows]
    widths = [max(len(row[i].text) for row in cells) for i in range(len(table.headings))]
    words = [i for i, right in enumerate(table.right) if not right]
    excess = sum(widths) + 2 * (len(widths) - 1) - width
    if excess > 0 and words:
        longest = max(words, key=lambda i: widths[i])
        widths[longest] = max(widths[longest] - excess, min(widths[longest], 10))
    return [(Span(table.title, "title"),), *(_row(row, widths, table.right) for row in cells)]


def _row(row: Sequence[Span], widths: Sequence[int], right: Sequence[bool]) -> Line:
    line = []
    for i, (span, width) in enumerate(zip(row, widths, strict=True)):
        text = shortened(span.text, width)
        padded = text.rjust(width) if right[i] else text.ljust(width)
        line.append(Span(padded if i == 0 else f"  {padded}", span.tone))
    return (*line[:-1], Span(line[-1].text.rstrip(), line[-1].tone))


def shortened(text: str, width: int) -> str:
    """Cut in the middle: the names of layers differ at their ends."""
    if len(text) <= width:
        return text
    tail = (width - 2) * 2 // 3
    return f"{text[: width - 2 - tail]}..{text[-tail:]}"


def plain(lines: Iterable[Line]) -> list[str]:
    """The lines without their tones."""
    return ["".join(span.text for span in line).rstrip() for line in lines]
