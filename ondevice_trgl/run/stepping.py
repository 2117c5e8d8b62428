"""What every schedule does to make a module step: its stepper as the module stands, and errors with their place."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from ondevice_trgl.errors import DamagedFileError, NonFiniteError
from ondevice_trgl.plan.plan import Rung, rung_within
from ondevice_trgl.run.batches import Source, check_finite
from ondevice_trgl.run.context import Context
from ondevice_trgl.run.position import Position
from ondevice_trgl.run.progress import Progress
from ondevice_trgl.run.stepper import Pressure, Stepper
from ondevice_trgl.trgl.multiplier import Multiplier
from ondevice_trgl.trgl.optim import Optimizer

_WIDE = 5.0
"""The spread of targets from which on it is told where a loss is not finite; learning rates are for about 1."""

Pressed = Callable[[Pressure, Rung], None]
"""Told of every time that memory ran short, with the rung that the module goes on at."""


def stepper_of(
    context: Context,
    index: int,
    position: Position,
    multiplier: Multiplier | None = None,
    *,
    lowest: Rung | None,
    pressed: Pressed,
) -> Stepper:
    """Module `index`, which is loaded, as it stands, on the highest rung that the budget allows, or where it was.

    `lowest` is the rung that it had to go down to before, if any; `multiplier` weighs its transport cost.
    """
    config, ladder = context.config, context.plan.ladders[index]
    rung = rung_within(ladder, context.budget.room)
    for lower in (lowest, position.rung if position.is_begun else None):
        if lower in ladder:
            rung = ladder[max(ladder.index(rung), ladder.index(lower))]
    optimizer = Optimizer(
        config.optimizer,
        context.objective(index, rung, multiplier).parameters(),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    optimizer.wrote = context.store.wrote
    state = context.budget.attempt(
        lambda: context.store.load_extra(index, "optim", context.device), f"optimizer state of module {index}"
    )
    if unfit := [name for name, tensor in state.items() if not optimizer.takes(name, tensor)]:
        raise DamagedFileError(
            f"{context.store.path(index)} does not fit the optimizer: {unfit[:3]}", hint="start a new run"
        )
    optimizer.load(state)
    return Stepper(
        partial(context.objective, index, multiplier=multiplier),
        optimizer,
        ladder,
        rung,
        batch_size=context.plan.batch_size,
        in_shape=context.partition.modules[index].in_shape,
        in_dtype=context.dtype(index),
        device=context.device,
        budget=context.budget,
        scratch=context.run.cache_folder(config.cache_dir),
        notify=pressed,
    )


def located(
    error: NonFiniteError,
    progress: Progress,
    where: str,
    data: str,
    source: Source,
    indices: Sequence[int],
    buffer: Tensor,
) -> NonFiniteError:
    """`error` with the place, and the sample of `source` among `indices` where the input itself is not finite.

    `where` and `data` name the module and what it reads, `buffer` is one for its inputs.
    """
    for start in range(0, len(indices), len(buffer)):
        part = indices[start : start + len(buffer)]
        source.read(part, buffer)
        check_finite(buffer, part, data)
    hint = "start again with a lower --lr or a larger --tau; the weights up to the last checkpoint are kept"
    targets = source.labels
    if targets.is_floating_point() and len(targets) > 1 and (spread := float(targets.std(0).max())) > _WIDE:
        hint = f"the targets have a spread of {spread:.3g}: scale them to about 1, or {hint}"
    return NonFiniteError(f"{error.message} in {where}, epoch {progress.epoch}, step {progress.step}", hint=hint)
