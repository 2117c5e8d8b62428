"""The ways to train any module, in the order of preference."""

import dataclasses

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.plan.plan import Level

SMALL_MICRO_BATCH = 4
"""Below this a step is mostly overhead: everything else is tried first."""


def levels_of(config: TrainConfig, batch: int, *, exact: bool, on_gpu: bool) -> list[Level]:
    """For `batch` samples a step. `exact`: accumulating gradients of micro-batches changes nothing in the result."""
    micros = [micro for micro in range(batch, 0, -1) if batch % micro == 0]
    fixed = config.micro_batch
    if isinstance(fixed, int):  # the batch itself may be smaller than was asked for, with few samples
        micros = [micro for micro in micros if micro <= fixed][:1]
    elif not exact and len(micros) > 1:
        micros.remove(1)  # statistics of one sample are none
    full, small = micros[:1], [micro for micro in micros[1:] if micro < SMALL_MICRO_BATCH]
    larger = [micro for micro in micros[1:] if micro >= SMALL_MICRO_BATCH]
    groups = [full + larger, small] if exact else [full, larger, small]
    found = [Level(micro, again) for group in groups for again in (False, True) for micro in group]
    if on_gpu or config.schedule == "parallel":  # there all modules' state is in memory between their steps
        return found
    return found + [dataclasses.replace(level, spilled=True) for level in found]
