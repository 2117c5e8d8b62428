"""What a run will write: flash memory stands so many bytes and no more."""

from itertools import pairwise

from ondevice_trgl.cache.codec import row_bytes
from ondevice_trgl.config import TrainConfig
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.plan.costs import Cost, Costs
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.trgl.optim import Optimizer


def write_bytes(plan: Plan, chain: Chain, costs: Costs, config: TrainConfig, *, rows: int, train_rows: int) -> int:
    """Bytes that an undisturbed run of `plan` writes to disk, `rows` samples of which `train_rows` are trained on.

    The weights that it starts with and those that it ends with, every boundary of every lap, each module at the end of
    each lap, and what spilled modules write at every step. Not known beforehand, and not in it: checkpoints in
    mid-training, at most one a minute; best epochs that `patience` keeps; file headers.
    """
    start = sum(segment.parameters + segment.buffers for segment in costs.segments)
    return 2 * start + _boundaries(plan, chain, config, rows) + _modules(plan, costs, config, train_rows)


def _boundaries(plan: Plan, chain: Chain, config: TrainConfig, rows: int) -> int:
    if plan.cache_tier != "disk":
        return 0
    sizes = [row_bytes(chain.segments[stop - 1].out_shape, plan.cache_dtype) for stop in plan.bounds[1:-1]]
    if config.schedule == "parallel":  # those of the frozen front, and what the classifier reads
        sizes = [*sizes[: plan.passed], *(sizes[-1:] if plan.classifier and len(sizes) > plan.passed else [])]
    return rows * sum(sizes) * config.laps


def _modules(plan: Plan, costs: Costs, config: TrainConfig, train_rows: int) -> int:
    total = 0
    for index, ((start, stop), rung) in enumerate(zip(pairwise(plan.bounds), plan.rungs, strict=True)):
        parts = parts_of(costs, start, stop)
        trained = sum(part.parameters for part in parts)
        state = Optimizer.state_bytes(config.optimizer, trained, config.momentum)
        weights = trained + sum(part.buffers for part in parts)
        total += config.laps * weights + (config.laps - 1) * state
        if rung.spilled:
            steps = train_rows // plan.batch_size * plan.epochs(config, index) * config.laps
            total += steps * (plan.batch_size // rung.micro_batch_size * trained + state)
    return total


def parts_of(costs: Costs, start: int, stop: int) -> list[Cost]:
    """Segments `start` to `stop` and the auxiliary head behind them, where there is one."""
    head = costs.heads[stop - 1] if stop < len(costs.segments) else None
    return [*costs.segments[start:stop], *([head] if head else [])]
