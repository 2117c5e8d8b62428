"""What the charts of the page are made of."""

from collections.abc import Iterable
from html import escape


def line(kind: str, x: float, top: int, bottom: int) -> str:
    """From `top` to `bottom`, at `x` percent."""
    return f'<line class="{kind}" x1="{x:.2f}%" x2="{x:.2f}%" y1="{top}" y2="{bottom}"/>'


def mark(color: str, name: str) -> str:
    """What a colour is, for `key`."""
    return f'<span><i style="background:var(--{color})"></i>{escape(name)}</span>'


def key(marks: Iterable[str]) -> str:
    """What colours and lines are, above a chart."""
    return f'<div class="key">{"".join(marks)}</div>'


def svg(height: int, label: str, parts: Iterable[str]) -> str:
    """The chart, so many pixels high, with what is read out in its place."""
    return f'<svg height="{height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
