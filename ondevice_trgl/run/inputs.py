"""What a network is fed: float32, or whole numbers (int64) where it looks them up and the data has them."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import fx, nn

from ondevice_trgl.errors import DataError, PartitionError
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.model.trace import trace as _trace
from ondevice_trgl.run.batches import Source, check_finite

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_LOOKUPS = ("embedding", "embedding_bag", "one_hot")


def traced(model: nn.Module, source: Source, *, freeze_norms: bool = False) -> Chain:
    """The chain of `model` for samples of `source`: its `in_dtype` is what they are to be read as.

    Bytes and other whole numbers are ids where the network looks them up, which takes int64; else they are numbers.
    The classifier is cut off the last layers, so that a head in its place is like those before it. `freeze_norms` as
    `trace` has it. Raises PartitionError, UsageError, NonFiniteError.
    """
    trace = partial(_trace, apart=True, freeze_norms=freeze_norms)
    if _whole(source) is None:
        with _explained(model):
            return trace(model, example_of(source))
    tables = any(isinstance(layer, _TABLES) for layer in model.modules())
    if tables:  # a network may take floats too, and round them: to it all bytes, as 0..1, would be one
        with contextlib.suppress(PartitionError):
            chain = trace(model, _ids(source))
            if any(_looks_up(node, chain) for node in chain.graph.nodes):
                return chain
    with _explained(model):
        try:
            return trace(model, example_of(source))
        except PartitionError as refused:
            try:
                return trace(model, _ids(source))
            except PartitionError:
                if tables:
                    raise
                raise refused from None


def check_ids(chain: Chain, data: Mapping[str, Source]) -> None:
    """Raises DataError where ids are taken and a split has other inputs, or ids beyond the table they are looked up in.

    Of a table behind arithmetic the range is not known.
    """
    if chain.in_dtype != torch.int64:
        return
    rows = min(_rows(chain), default=None)
    for name, split in data.items():
        found = _whole(split)
        if found is None:
            raise DataError(f"the {name} set has inputs that are no whole numbers; the network looks them up as ids")
        bad = found[0] if found[0] < 0 else found[1]
        if rows is not None and not 0 <= bad < rows:
            raise DataError(
                f"id {bad} in the {name} set is out of range: the network's table has {rows} rows",
                hint=f"ids are whole numbers from 0 to {rows - 1}; or give the table more rows",
            )


def _whole(source: Source) -> tuple[int, int] | None:
    """See `ImageSet.whole`."""
    found: tuple[int, int] | None = getattr(source, "whole", None)
    return found


def example_of(source: Source, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The first two samples, as a batch. Raises NonFiniteError."""
    example = torch.zeros((2, *source.shape), dtype=dtype)
    first = [0, min(1, len(source.labels) - 1)]
    source.read(first, example)
    check_finite(example, first, "the training data")
    return example


def _ids(source: Source) -> torch.Tensor:
    """Zero is in every table: ids that are not are told of by name, see `check_ids`."""
    return torch.zeros((2, *source.shape), dtype=torch.int64)


@contextlib.contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    """Give a refusal of the input the hint that goes with it, where the number format is the likely cause."""
    try:
        yield
    except PartitionError as error:
        others = sorted(
            {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
        )
        if "does not accept an input" not in error.message:
            raise
        if others:
            hint = f"its weights are {', '.join(others)}, inputs are torch.float32: model.float(), or cast in forward"
            raise PartitionError(error.message, hint=hint) from error
        if any(isinstance(layer, _TABLES) for layer in model.modules()):
            hint = "if it looks ids up, the dataset has to give them as whole numbers (torch.int64)"
            raise PartitionError(error.message, hint=hint) from error
        raise


def _looks_up(node: fx.Node, chain: Chain) -> bool:
    """Whether `node` looks up what comes, as whole numbers all the way, from the network's input."""
    if node.op == "call_module":
        if not isinstance(chain.model.get_submodule(str(node.target)), _TABLES):
            return False
    elif node.op != "call_function" or getattr(node.target, "__name__", "") not in _LOOKUPS:
        return False
    waiting, seen = list(node.all_input_nodes), set[fx.Node]()
    while waiting:
        other = waiting.pop()
        dtype = other.meta.get("dtype")
        if other in seen or dtype is None or dtype.is_floating_point:
            continue
        if other.op == "placeholder":
            return True
        seen.add(other)
        waiting += other.all_input_nodes
    return False


def _rows(chain: Chain) -> Iterator[int]:
    """Of every table that the input itself is looked up in."""
    for node in chain.graph.nodes:
        if node.op == "call_module" and node.all_input_nodes[:1] and node.all_input_nodes[0].op == "placeholder":
            layer = chain.model.get_submodule(str(node.target))
            if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
                yield layer.num_embeddings
