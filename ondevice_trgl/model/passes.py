"""Passes of a network, recorded one by one, and whether they are all that it does.

What a pass depends on beside its input, and what no recording shows, is found here: tensors that come from elsewhere
and differ by the pass, and numbers that the network counts with in Python.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ondevice_trgl.errors import PartitionError, TrglError, first_line
from ondevice_trgl.model.calls import is_users
from ondevice_trgl.model.counted import Numbers, Place
from ondevice_trgl.model.inplace import changes_its_input
from ondevice_trgl.model.modes import Modes
from ondevice_trgl.model.output import logits_of
from ondevice_trgl.model.recording import Recorder
from ondevice_trgl.model.steps import Ref, Step, Untraceable, refs_in
from ondevice_trgl.model.untouched import held_tensors, seed_torch, untouched

BATCHES = (2, 3)
Key = tuple[bool, int]
"""(train mode, batch size) of a pass."""


def rows(example: Tensor, size: int) -> Tensor:
    """A batch of `size` samples out of those of `example`, as a copy."""
    return example[torch.arange(size) % len(example)].clone()


def other_rows(example: Tensor, size: int) -> Tensor:
    """`size` samples that differ from those of the trace."""
    batch = rows(example, size)
    if not batch.is_floating_point():
        return batch.roll(1, -1)
    with torch.random.fork_rng(devices=[]):
        seed_torch(20_230_917)
        return batch + torch.randn_like(batch) * (0.1 * float(batch.float().std()) + 0.1)


def record(
    model: nn.Module,
    example: Tensor,
    leaves: set[str],
    modes: Modes,
    key: Key,
    *,
    backward: bool,
    ahead: Mapping[Place, tuple[Any, str]] | None = None,
) -> Recorder:
    recorder, batch = Recorder(model, leaves, backward=backward), rows(example, key[1])
    with untouched(model):
        modes.apply(model, training=key[0])
        numbers = Numbers(model)
        if ahead is not None:
            numbers.put_ahead(ahead)
        try:
            output = recorder.run(batch)
            recorder.numbers = numbers.changed()
            left = [tensor for tensor in held_tensors(model) if recorder.made(tensor)]
            if left and ahead is None and key[1] == BATCHES[0]:
                _check_left(model, batch, leaves, left, backward=backward)
        except TrglError:
            raise
        except Exception as error:  # whatever the user's forward raises: its own code ran, on a real batch
            raise _refused(model, batch, error) from error
    recorder.output(logits_of(output, type(model).__name__))
    return recorder


def _refused(model: nn.Module, batch: Tensor, error: Exception) -> PartitionError:
    place, traceback = "", error.__traceback__
    while traceback is not None:
        if is_users(traceback.tb_frame):
            place = f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}: "
        traceback = traceback.tb_next
    return PartitionError(
        f"{type(model).__name__} does not accept an input of shape {tuple(batch.shape)}: {place}{first_line(error)}",
        hint="check the number of channels and the image size that the network expects",
    )


def live(steps: Sequence[Step], model: nn.Module) -> list[Step]:
    """The steps that the output comes from, and those that change something; numbered anew."""
    modules = dict(model.named_modules())
    wanted: set[int] = set()
    for index in reversed(range(len(steps))):
        step = steps[index]
        kept = step.op in ("placeholder", "output", "call_module") or changes_its_input(step, modules)
        if kept or index in wanted:
            wanted.add(index)
            wanted.update(ref.index for ref in refs_in((step.args, step.kwargs)))
    numbers = {index: number for number, index in enumerate(sorted(wanted))}

    def renumbered(value: Any) -> Any:
        return _mapped(value, lambda part: Ref(numbers[part.index]) if isinstance(part, Ref) else part)

    return [replace(steps[i], args=renumbered(steps[i].args), kwargs=renumbered(steps[i].kwargs)) for i in numbers]


def _check_left(model: nn.Module, batch: Tensor, leaves: set[str], left: Sequence[Tensor], *, backward: bool) -> None:
    """Raises Untraceable where a pass reads what the one before it left behind, such as a hidden state."""
    reason = "reads what an earlier pass has left behind"
    again = Recorder(model, leaves, backward=backward)
    again.run(batch)
    if step := again.first_use(left):
        raise Untraceable(reason, step.stack[-1][0] if step.stack else "", step.line)


def check_constants(runs: Sequence[Recorder]) -> None:
    """Raises Untraceable where a tensor that no recorded call made is not the same one in all passes."""
    for name, value in runs[-1].constants.items():
        others = [run.constants.get(name) for run in runs[:-1]]
        if not all(other is not None and _same(other, value) for other in others):
            step = next(step for step in runs[-1].steps if step.op == "get_attr" and step.target == name)
            reason = "uses a tensor that was not made by calls of torch that can be recorded"
            raise Untraceable(reason, step.stack[-1][0] if step.stack else "", step.line)


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other))


def check_numbers(
    model: nn.Module, example: Tensor, leaves: set[str], modes: Modes, runs: Mapping[Key, Recorder], *, backward: bool
) -> None:
    """Raises Untraceable where calls depend on a number that passes change, as one that counts them."""
    for training in (False, True):
        key = (training, BATCHES[0])
        moved = runs[key].numbers
        if not moved:
            continue
        name = next(iter(moved.values()))[1]
        reason = f"depends on {name}, a number that forward changes"
        try:
            later = record(model, example, leaves, modes, key, backward=backward, ahead=moved)
        except PartitionError as error:
            raise Untraceable(reason, "", "") from error
        steps = [live(run.steps, model) for run in (runs[key], later)]
        for one, other in zip(*steps, strict=False):
            if repr((one.op, one.target, one.args, one.kwargs)) != repr(
                (other.op, other.target, other.args, other.kwargs)
            ):
                raise Untraceable(reason, one.stack[-1][0] if one.stack else "", one.line)
        if len(steps[0]) != len(steps[1]):
            raise Untraceable(reason, "", "")


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_mapped(item, change) for item in value)
    if isinstance(value, dict):
        return {name: _mapped(item, change) for name, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(part, change) for part in (value.start, value.stop, value.step)))
    return change(value)
