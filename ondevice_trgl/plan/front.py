"""The frozen front of a network: nothing of it is trained, so that it is as few modules as can be passed through."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import inf

from ondevice_trgl.model.bounds import balance
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.plan.cuts import can_be_cut, can_end
from ondevice_trgl.plan.plan import Rung


def front_within(chain: Chain, ladder: Callable[[int, int], Sequence[Rung]], budget: float) -> tuple[int, ...]:
    """Bounds of the front in the fewest modules that fit `budget`; where none do, in those whose largest takes least.

    `ladder` gives the ways to pass segments (start, stop) as one module. Without a front: (0,).
    """

    def peak(start: int, stop: int) -> int:
        return ladder(start, stop)[-1].peak_bytes

    def most(bounds: tuple[int, ...]) -> int:
        return max(peak(a, b) for a, b in pairwise(bounds))

    if not chain.prefix:
        return (0,)
    if peak(0, chain.prefix) <= budget:
        return 0, chain.prefix
    ways = balance(chain.prefix, chain.prefix, lambda a, b: peak(a, b) if can_end(chain, b) else inf)
    possible = [bounds for bounds in ways if can_be_cut(chain, (*bounds, len(chain.segments)))]
    return next((bounds for bounds in possible if most(bounds) <= budget), min(possible, key=most))
