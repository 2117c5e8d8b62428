"""Fine-tuning: which parameters train, and which layers in front are passed through once and never trained.

What is not to train has `requires_grad` off, as if the network's owner had turned it off; nothing is turned on.
"""

import dataclasses
import operator
from collections.abc import Iterator

import torch
from torch import fx, nn

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import ConfigError, PartitionError, UsageError
from ondevice_trgl.model.bounds import cut_behind
from ondevice_trgl.model.modes import Modes
from ondevice_trgl.model.residual import is_weighted
from ondevice_trgl.model.trace import Chain, layer_paths

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def tuned(chain: Chain, config: TrainConfig) -> Chain:
    """`chain` with the parameters that `config` does not train frozen, in place, and its frozen front marked.

    The front (`prefix`) ends behind the layer `freeze_until`, with train = "last" in front of the classifier. Its
    layers stay in eval mode. Raises PartitionError for a name where no module can end, UsageError where nothing of what
    is to train is there.
    """
    if config.freeze_until is None and config.train == "all":
        return chain
    prefix = 0 if config.freeze_until is None else _cut(chain, config.freeze_until)
    if config.train == "last":
        prefix = max(prefix, _last_cut(chain))
    trained = {id(p) for p in _trained(chain, config.train)}
    for index, segment in enumerate(chain.segments):
        for parameter in parameters_of(chain, segment.nodes):
            if index < prefix or id(parameter) not in trained:
                parameter.requires_grad_(False)
    if config.train in ("norm", "bias") and not _trains(chain, prefix):
        what = {"norm": "norm with a scale or shift", "bias": "bias"}[config.train]
        behind = f" behind {config.freeze_until}" if config.freeze_until else ""
        raise UsageError(
            f"train = {config.train!r}: {type(chain.model).__name__} has no {what} to train{behind}",
            hint="train = 'last' trains its classifier alone, 'all' everything (--train)",
        )
    still = dict.fromkeys(_paths_of(chain, prefix), False)
    return dataclasses.replace(chain, prefix=prefix, modes=Modes(chain.modes.kept | still))


def parameters_of(chain: Chain, nodes: tuple[fx.Node, ...]) -> Iterator[nn.Parameter]:
    """What `nodes` of `chain` use of the network's parameters; one that is used twice comes twice."""
    for node in nodes:
        if node.op == "call_module":
            yield from chain.root.get_submodule(str(node.target)).parameters()
        for used in node.all_input_nodes:
            if used.op == "get_attr":
                value = operator.attrgetter(str(used.target))(chain.root)
                if isinstance(value, nn.Parameter):
                    yield value


def classifier_nodes(chain: Chain) -> tuple[fx.Node, ...]:
    """Of the network's own classifier: its segment or, where it has none of its own, the last layer with weights."""
    last = chain.segments[-1].nodes
    if chain.trunk < len(chain.segments):
        return last
    layers = dict(chain.root.named_modules())
    return next(((node,) for node in reversed(last) if is_weighted(node, layers, chain.root)), last)


def check_is_classifier(chain: Chain, layer: str, why: str) -> None:
    """Raises ConfigError where `layer`, which `why` says was left without weights, is not the network's classifier."""
    used = [str(node.target) for own in classifier_nodes(chain) for node in (own, *own.all_input_nodes)]
    if not any(path == layer or path.startswith(f"{layer}.") for path in used):
        raise ConfigError(
            [f"{why}, and it is not the classifier"], source="weights", hint=f"--weights-skip {layer} leaves it so"
        )


def _cut(chain: Chain, name: str) -> int:
    """The segments up to the end of layer `name`."""
    stop = cut_behind(chain, name, what="freeze_until")
    if not _can_end(chain, stop):
        dtype = chain.segments[stop - 1].output.meta["dtype"]
        raise PartitionError(
            f"freeze_until = {name!r}: activations behind it are {dtype}; what is frozen can end where they are "
            "torch.float32",
            hint="name another layer, or cast them there (.float())",
        )
    return stop


def _last_cut(chain: Chain) -> int:
    """The segments in front of the classifier, or as many of them as a boundary can be kept behind."""
    most = min(chain.trunk, len(chain.segments) - 1)
    return next((stop for stop in range(most, 0, -1) if _can_end(chain, stop)), 0)


def _can_end(chain: Chain, stop: int) -> bool:
    return bool(chain.segments[stop - 1].output.meta["dtype"] == torch.float32)


def _trained(chain: Chain, what: str) -> Iterator[nn.Parameter]:
    """What `what` (as the setting `train` has it) means in this network, the classifier included."""
    if what == "all":
        yield from chain.root.parameters()
        return
    yield from parameters_of(chain, classifier_nodes(chain))
    yield from _kind(chain.root, what)


def _kind(root: nn.Module, what: str) -> Iterator[nn.Parameter]:
    for layer in root.modules():
        is_norm = isinstance(layer, _NORMS) or "norm" in type(layer).__name__.lower()
        for name, parameter in layer._parameters.items():
            if parameter is None:
                continue
            if (what == "norm" and is_norm and parameter.ndim <= 1) or (what == "bias" and name.endswith("bias")):
                yield parameter


def _trains(chain: Chain, prefix: int) -> bool:
    """Whether anything but the classifier trains behind the first `prefix` segments."""
    own = {id(p) for p in parameters_of(chain, classifier_nodes(chain))}
    nodes = tuple(node for segment in chain.segments[prefix:] for node in segment.nodes)
    return any(p.requires_grad and id(p) not in own for p in parameters_of(chain, nodes))


def _paths_of(chain: Chain, prefix: int) -> set[str]:
    """Layers, and what they are in, that the first `prefix` segments use and no other does."""
    front, behind = (
        {path for segment in part for node in segment.nodes for path in layer_paths(node)}
        for part in (chain.segments[:prefix], chain.segments[prefix:])
    )
    alone = front - behind
    inside = {path for path, _ in chain.root.named_modules() if any(path.startswith(f"{one}.") for one in alone)}
    return alone | (inside - behind)
