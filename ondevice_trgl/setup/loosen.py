"""A plan with room to spare: the allocator is held no tighter than its budget needs."""

import dataclasses

from ondevice_trgl.plan.costs import Costs
from ondevice_trgl.plan.plan import Plan, Rung
from ondevice_trgl.setup.rehearse import Rehearsals


def loosened(plan: Plan, costs: Costs, rehearsals: Rehearsals) -> Plan:
    """`plan` with faster rungs above the one on which each module would be trained, where the allocator has a choice.

    Each was rehearsed and fits the budget. What a module falls back on when memory runs short is the rung it had.
    """
    ladders, breakdowns, found = list(plan.ladders), list(plan.breakdowns), set()
    for index, chosen in enumerate(plan.rungs):
        at = plan.ladders[index].index(chosen)
        known = rehearsals.above.get((plan.bounds[index], plan.bounds[index + 1], chosen.level))
        above: list[Rung] = []
        for rung, took in rehearsals.looser(plan, costs, index):
            assert known is not None
            more = max(1, took.above_bytes - known.above_bytes)  # what is held tighter counts as less
            peak = chosen.peak_bytes + more
            if peak <= min([plan.budget_bytes, *(one.peak_bytes - 1 for one in above)]):
                above.append(dataclasses.replace(rung, peak_bytes=peak))
        if not above:
            continue
        found.add(above[0].hold)
        ladders[index] = (*ladders[index][:at], *above, *ladders[index][at:])
        if breakdowns:
            own = breakdowns[index][at]
            looser = [own.with_total(rung.peak_bytes, floor=plan.floor_bytes) for rung in above]
            breakdowns[index] = (*breakdowns[index][:at], *looser, *breakdowns[index][at:])
    if not found:
        return plan
    reason = "memory allows the allocator to keep more of what is freed: faster, and tightened where memory runs short"
    return dataclasses.replace(
        plan, ladders=tuple(ladders), breakdowns=tuple(breakdowns), reasons=(*plan.reasons, reason)
    )
