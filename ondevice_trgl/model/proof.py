"""The proof that a chain is its network: both run on the same samples, forward and backward, and must agree.

In eval mode at batch sizes that the trace has not seen, and in train mode from the same random numbers: outputs, which
parameters have a gradient and what it is, what the buffers are afterwards, how many random numbers were drawn.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ondevice_trgl.device.limit import lacks_memory
from ondevice_trgl.errors import PartitionError, TrglError
from ondevice_trgl.model.graph import rows
from ondevice_trgl.model.output import logits_of
from ondevice_trgl.model.spilled import saved_on_disk
from ondevice_trgl.model.store import tensors_of
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.model.untouched import untouched

_SAMPLES = 1024
"""Elements of a large tensor that are compared, at even distances."""
_CLOSE = 1e-3
"""Of a tensor's largest element: the same operators in the same order differ by far less."""
_LARGE_INPUT = 50_000
"""Elements of a sample, above which fewer samples have to do."""
_SEED = 20_230_917
Run = Callable[[Tensor], Tensor]


@dataclass
class _Observed:
    output: Tensor
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    numbers: Tensor


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
    model = chain.model

    def network(x: Tensor) -> Tensor:
        return logits_of(model(x), type(model).__name__)

    def composed(x: Tensor) -> Tensor:
        for segment in segments:
            segment.train(training)
            x = segment(x)
        return x

    before = {name: _glimpse(p) for name, p in model.named_parameters()}
    training = False
    large_input = example[:1].numel() > _LARGE_INPUT
    for size in (1, 4) if large_input else (5, 1):
        batch = _other(example, size)
        try:
            wanted = _evaluate(chain, network, batch)
        except Exception as error:
            if isinstance(error, TrglError) or lacks_memory(error):
                raise
            if size == 1:
                continue  # the network itself does not take one sample
            raise PartitionError(
                f"{type(model).__name__} takes {len(example)} samples at once, and not {size}: {_first_line(error)}",
                hint="take the batch size from the input",
            ) from error
        changed = [name for name, p in model.named_parameters() if not torch.equal(_glimpse(p), before[name])]
        if changed:
            raise PartitionError(
                f"{type(model).__name__}.forward changes its parameter {changed[0]}",
                hint="change parameters behind the optimizer's step, in a callback's on_step_end",
            )
        between()
        try:
            got = _evaluate(chain, composed, batch)
        except Exception as error:
            if isinstance(error, TrglError) or lacks_memory(error):
                raise
            reason = f"does not run on {size} samples, {_first_line(error)},"
            raise _differs(chain, reason, network, network, batch, training=False) from error
        if not _close(got, wanted):
            raise _differs(chain, f"gives other results for {size} samples", network, composed, batch, training=False)
        between()
        if large_input:
            break
    training = True
    large = {id(p) for p in model.parameters() if largest_bytes is not None and _bytes(p) > largest_bytes}
    spill = contextlib.nullcontext if folder is None else lambda: saved_on_disk(folder, list(model.parameters()))
    batch = _other(example, 1 if large_input else 2)
    try:
        first = _train(chain, network, batch, spill, large, read)
    except Exception as error:
        if not large_input or isinstance(error, TrglError) or lacks_memory(error):
            raise
        batch = _other(example, 2)  # a norm may ask for more than one
        first = _train(chain, network, batch, spill, large, read)
    between()
    second = _train(chain, composed, batch, spill, large, read)
    if reason := _difference(first, second):
        raise _differs(chain, reason, network, composed, batch, training=True)


def _evaluate(chain: Chain, run: Run, batch: Tensor) -> Tensor:
    with untouched(chain.model), torch.no_grad():
        chain.modes.apply(chain.model, training=False)
        _seed()
        return run(batch.clone()).clone()


def _train(chain: Chain, run: Run, batch: Tensor, spill: Any, large: set[int], read: Any) -> _Observed:
    model = chain.model
    gradients: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[Tensor], None]:
        def noted(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradients[name] = _sample(parameter.grad)
            parameter.grad = None
            read(parameter)

        return noted

    with contextlib.ExitStack() as undo:
        undo.enter_context(untouched(model))
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
            state = {name: _sample(t) for name, t in tensors_of(model) if not isinstance(t, nn.Parameter)}
            if output.requires_grad:
                weights = torch.linspace(-1.0, 1.0, output.numel(), dtype=output.dtype).view_as(output)
                (output * weights).sum().backward()
        return _Observed(output.detach().clone(), gradients, state, numbers)


def _difference(network: _Observed, chain: _Observed) -> str:
    """In what the chain differs from the network in a training step; "" where it does not."""
    missing = sorted(network.gradients.keys() - chain.gradients.keys())
    foreign = sorted(chain.gradients.keys() - network.gradients.keys())
    if not _close(chain.output, network.output):
        return "gives other results in train mode"
    if missing:
        return f"gives no gradient to {missing[0]}"
    if foreign:
        return f"gives a gradient to {foreign[0]}, which has none,"
    scale = max((float(g.abs().max()) for g in network.gradients.values() if g.numel()), default=0.0)
    wrong = [name for name, g in network.gradients.items() if not _close(chain.gradients[name], g, least=1e-6 * scale)]
    if wrong:
        return f"gives another gradient to {wrong[0]}"  # the first that the backward pass comes to
    moved = [name for name, value in network.state.items() if not _close(chain.state[name], value)]
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
            with _watched(chain) as seen:
                run(batch.clone())
        runs.append(seen)
    same = 0
    for (path, wanted), (other, got) in zip(*runs, strict=False):
        if path != other or not _close(got, wanted):
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


@contextlib.contextmanager
def _watched(chain: Chain) -> Iterator[list[tuple[str, Tensor]]]:
    """Samples of what the layers put out that the chain calls, in order."""
    seen: list[tuple[str, Tensor]] = []

    def watch(path: str) -> Callable[..., None]:
        def ran(layer: nn.Module, args: Any, result: Any) -> None:
            if isinstance(result, Tensor):
                seen.append((path, _sample(result)))

        return ran

    paths = {str(node.target) for node in chain.graph.nodes if node.op == "call_module"}
    handles = [chain.root.get_submodule(path).register_forward_hook(watch(path)) for path in sorted(paths)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _seed() -> None:
    torch.manual_seed(_SEED)
    random.seed(_SEED)


def _other(example: Tensor, size: int) -> Tensor:
    """`size` samples that differ from those of the trace."""
    batch = rows(example, size)
    if not batch.is_floating_point():
        return batch.roll(1, -1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return batch + torch.randn_like(batch) * (0.1 * float(batch.float().std()) + 0.1)


def _sample(tensor: Tensor) -> Tensor:
    """Some elements of `tensor`, as float32."""
    values = tensor.detach().coalesce().values() if tensor.is_sparse else tensor.detach()
    flat = values.reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].float().clone()


def _glimpse(tensor: Tensor) -> Tensor:
    """A few neighbouring elements: of a tensor in a file, little comes into memory."""
    flat = tensor.detach().reshape(-1)
    return flat[flat.numel() // 2 :][:64].clone()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _close(got: Tensor, wanted: Tensor, least: float = 1e-7) -> bool:
    if got.shape != wanted.shape:
        return False
    known = wanted[wanted.isfinite()].abs()
    most = float(known.max()) if known.numel() else 0.0
    return torch.allclose(got.float(), wanted.float(), rtol=0.0, atol=_CLOSE * most + least, equal_nan=True)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
