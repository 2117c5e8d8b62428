"""The proof that a chain is its network: both run on the same samples, forward and backward, and must agree.

In eval mode at batch sizes that the trace has not seen, and in train mode from the same random numbers: outputs, which
parameters have a gradient and what it is, what the buffers are afterwards, how many random numbers were drawn.
"""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ondevice_trgl.device.limit import lacks_memory
from ondevice_trgl.errors import PartitionError, TrglError, first_line
from ondevice_trgl.model.calls import may_change
from ondevice_trgl.model.compared import close, glimpse, leaves_of, sample, watched
from ondevice_trgl.model.output import logits_of
from ondevice_trgl.model.passes import other_rows
from ondevice_trgl.model.patches import ONE_AT_A_TIME
from ondevice_trgl.model.spilled import saved_on_disk
from ondevice_trgl.model.store import tensors_of
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.model.untouched import kept, seed_torch, untouched

_LARGE_INPUT = 20_000
"""Elements of a sample, above which fewer samples have to do."""
_SEED = 20_230_917
Run = Callable[[Tensor], Tensor]


@dataclass
class _Observed:
    output: Tensor
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    numbers: Tensor
    changed: list[str]
    """Parameters that the forward pass changed, by name."""


def prove(
    chain: Chain,
    segments: Sequence[nn.Module],
    example: Tensor,
    *,
    folder: Path | None = None,
    largest_bytes: int | None = None,
    read: Callable[[Tensor], None] = lambda parameter: None,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Raises PartitionError where `segments`, those of `chain` as modules one after the other, are not the network.

    `example` is a batch of at least one sample. The network is left as it was. Memory: a forward pass at a batch of 5,
    the gradient of one parameter, and what a backward pass at a batch of 2 needs, which goes into a file in `folder`
    where that is given; of large inputs one sample. Of parameters above `largest_bytes` no gradient is computed. `read`
    is called behind each parameter that the backward pass has read, `between` between two passes.
    """
    with ONE_AT_A_TIME:
        try:
            _prove(chain, segments, example, folder, largest_bytes, read, between)
        except PartitionError:
            # another thread of the app may have drawn random numbers meanwhile: of the same generator
            _prove(chain, segments, example, folder, largest_bytes, read, between)


def _prove(
    chain: Chain,
    segments: Sequence[nn.Module],
    example: Tensor,
    folder: Path | None,
    largest_bytes: int | None,
    read: Callable[[Tensor], None],
    between: Callable[[], None],
) -> None:
    model = chain.model
    names = {id(p): name for name, p in model.named_parameters()}

    def network(x: Tensor) -> Tensor:
        return logits_of(model(x), type(model).__name__)

    def composed(x: Tensor) -> Tensor:
        seen: set[Any] = {None}
        for segment in segments:
            segment.train(training)
            x = segment(x)
            held = {id(p) for p in segment.parameters()}
            foreign = [names[id(p)] for p in leaves_of(x, seen) if id(p) in names and id(p) not in held]
            if foreign:
                raise _foreign(chain, foreign[0], segment)
        return x

    before = {name: glimpse(p) for name, p in model.named_parameters()}
    training = False
    large_input = example[:1].numel() > _LARGE_INPUT
    for size in (1, 4) if large_input else (5, 1):
        batch = other_rows(example, size)
        try:
            wanted, moved = _evaluate(chain, network, batch)
        except Exception as error:
            if isinstance(error, TrglError) or lacks_memory(error):
                raise
            if size == 1:
                continue  # the network itself does not take one sample
            raise PartitionError(
                f"{type(model).__name__} takes {len(example)} samples at once, and not {size}: {first_line(error)}",
                hint="take the batch size from the input",
            ) from error
        changed = [name for name, p in model.named_parameters() if not torch.equal(glimpse(p), before[name])]
        if changed or (moved and _keeps_changing(chain, network, batch, training=False)):
            raise _changes(chain, (changed or moved)[0])
        between()
        try:
            got, _ = _evaluate(chain, composed, batch)
        except Exception as error:
            if isinstance(error, TrglError) or lacks_memory(error):
                raise
            reason = f"does not run on {size} samples, {first_line(error)},"
            raise _differs(chain, reason, network, network, batch, training=False) from error
        if not close(got, wanted):
            raise _differs(chain, f"gives other results for {size} samples", network, composed, batch, training=False)
        between()
        if large_input:
            break
    training = True
    large = {id(p) for p in model.parameters() if largest_bytes is not None and _bytes(p) > largest_bytes}
    spill = contextlib.nullcontext if folder is None else lambda: saved_on_disk(folder, list(model.parameters()))
    for size in (1, 2) if large_input else (2,):
        batch = other_rows(example, size)
        try:
            first = _train(chain, network, batch, spill, large, read)
            break
        except Exception as error:
            if isinstance(error, TrglError) or lacks_memory(error):
                raise
            if size == 1:
                continue  # a norm may ask for more than one sample
            raise PartitionError(
                f"{type(model).__name__} does not train: {first_line(error)}",
                hint="one step of it by itself, forward and backward, fails so too",
            ) from error
    changed = [name for name, p in model.named_parameters() if not torch.equal(glimpse(p), before[name])]
    if changed or (first.changed and _keeps_changing(chain, network, batch, training=True)):
        raise _changes(chain, (changed or first.changed)[0])
    between()
    try:
        second = _train(chain, composed, batch, spill, large, read)
    except Exception as error:
        if isinstance(error, TrglError) or lacks_memory(error):
            raise
        reason = f"does not train, {first_line(error)},"
        raise _differs(chain, reason, network, network, batch, training=True) from error
    if reason := _difference(first, second):
        raise _differs(chain, reason, network, composed, batch, training=True)


def _evaluate(chain: Chain, run: Run, batch: Tensor) -> tuple[Tensor, list[str]]:
    """What `run` gives, and the parameters that it changed."""
    with untouched(chain.model), _weights_kept(chain) as moved, torch.no_grad():
        chain.modes.apply(chain.model, training=False)
        _seed()
        output = run(batch.clone()).clone()
    return output, moved


@contextlib.contextmanager
def _weights_kept(chain: Chain) -> Iterator[list[str]]:
    """Puts back parameters that a module which is kept whole may change; the list holds the names of those it did."""
    whole = {str(node.target): None for node in chain.graph.nodes if node.op == "call_module"}
    own = {id(p): p for path in whole for p in may_change(chain.root.get_submodule(path))}
    names: list[str] = []
    with kept(own.values()) as moved:
        yield names
    names += [name for name, p in chain.model.named_parameters() if any(p is other for other in moved)]


def _keeps_changing(chain: Chain, network: Run, batch: Tensor, *, training: bool) -> bool:
    """Whether a second pass changes parameters again: a norm that is held does not."""
    with untouched(chain.model), _weights_kept(chain), torch.no_grad():
        chain.modes.apply(chain.model, training=training)
        after = []
        for _ in range(2):
            _seed()
            network(batch.clone())
            after.append([glimpse(p) for p in chain.model.parameters()])
        return not all(close(two, one) for one, two in zip(*after, strict=True))


def _foreign(chain: Chain, name: str, segment: nn.Module) -> PartitionError:
    where = getattr(segment, "label", "a module")
    return PartitionError(
        f"{type(chain.model).__name__} cannot be cut: {where} uses the parameter {name}, which it does not hold",
        hint="hold it there as well: assign the same Parameter, or the module that has it, as an attribute",
    )


def _changes(chain: Chain, name: str) -> PartitionError:
    return PartitionError(
        f"{type(chain.model).__name__}.forward changes its parameter {name}",
        hint="change parameters behind the optimizer's step, in a callback's on_step_end",
    )


def _train(chain: Chain, run: Run, batch: Tensor, spill: Any, large: set[int], read: Any) -> _Observed:
    model = chain.model
    gradients: dict[str, Tensor] = {}
    names = _state_of(chain)

    def note(name: str) -> Callable[[Tensor], None]:
        def noted(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradients[name] = sample(parameter.grad)
            parameter.grad = None
            read(parameter)

        return noted

    with contextlib.ExitStack() as undo:
        undo.enter_context(untouched(model))
        changed = undo.enter_context(_weights_kept(chain))
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if id(parameter) in large and parameter.requires_grad:
                parameter.requires_grad_(False)
                undo.callback(parameter.requires_grad_, True)
            if parameter.requires_grad:
                undo.callback(parameter.register_post_accumulate_grad_hook(note(name)).remove)
        chain.modes.apply(model, training=True)
        _seed()
        with spill(), torch.enable_grad():
            output = run(batch.clone())
            numbers = torch.get_rng_state()
            # before the backward pass, in which a network's own checkpointing moves statistics once more
            tensors = dict(tensors_of(model))
            state = {name: sample(tensors[name]) for name in sorted(names & tensors.keys())}
            if output.requires_grad:
                weights = torch.linspace(-1.0, 1.0, output.numel(), dtype=output.dtype).view_as(output)
                (output * weights).sum().backward()
        return _Observed(output.detach().clone(), gradients, state, numbers, changed)


def _state_of(chain: Chain) -> set[str]:
    """The buffers, and those tensors beside them that the chain reads: what forward leaves for itself is not of it."""
    read = {str(node.target) for node in chain.graph.nodes if node.op == "get_attr"}
    buffers = {id(buffer) for buffer in chain.model.buffers()}
    tensors = tensors_of(chain.model)
    return {n for n, t in tensors if not isinstance(t, nn.Parameter) and (id(t) in buffers or n in read)}


def _difference(network: _Observed, chain: _Observed) -> str:
    """In what the chain differs from the network in a training step; "" where it does not."""
    missing = sorted(network.gradients.keys() - chain.gradients.keys())
    foreign = sorted(chain.gradients.keys() - network.gradients.keys())
    if not close(chain.output, network.output):
        return "gives other results in train mode"
    if missing:
        return f"gives no gradient to {missing[0]}"
    if foreign:
        return f"gives a gradient to {foreign[0]}, which has none,"
    scale = max((float(g.abs().max()) for g in network.gradients.values() if g.numel()), default=0.0)
    wrong = [name for name, g in network.gradients.items() if not close(chain.gradients[name], g, least=1e-6 * scale)]
    if wrong:
        return f"gives another gradient to {wrong[0]}"  # the first that the backward pass comes to
    both = network.state.keys() & chain.state.keys()
    moved = [name for name in sorted(both) if not close(chain.state[name], network.state[name])]
    if moved:
        return f"leaves another value in the buffer {moved[0]}"
    return "" if torch.equal(network.numbers, chain.numbers) else "draws other random numbers"


def _differs(
    chain: Chain, reason: str, network: Run, composed: Run, batch: Tensor, *, training: bool
) -> PartitionError:
    """The refusal, with the layer behind which the two begin to differ."""
    runs = []
    for run in (network, composed):
        with untouched(chain.model), torch.no_grad():
            chain.modes.apply(chain.model, training=training)
            _seed()
            with watched(chain) as seen:
                run(batch.clone())
        runs.append(seen)
    same = 0
    for (path, wanted), (other, got) in zip(*runs, strict=False):
        if path != other or not close(got, wanted):
            break
        same += 1
    calls = [node for node in chain.graph.nodes if node.op == "call_module"]
    begins, ends = min(same, len(calls)), len(runs[0])
    where = ""
    if begins < ends and same < len(calls):
        node = calls[begins]
        where = f" from {node.target} on ({str(node.meta.get('line', '')).rstrip(': ')})"
    return PartitionError(
        f"{type(chain.model).__name__} cannot be cut: cut into modules it {reason}{where}",
        hint="what forward does there outside of the calls of torch is lost when it is cut: put it into a submodule of "
        "its own, which is then kept whole",
    )


def _seed() -> None:
    seed_torch(_SEED)
    random.seed(_SEED)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(_SEED)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
