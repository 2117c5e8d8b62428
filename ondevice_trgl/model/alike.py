"""Which pieces of a network are alike: the same layers on the same shapes take the same memory, measured once."""

import hashlib
import json
import operator
from typing import Any

import torch
from torch import fx, nn

from ondevice_trgl.model.partition import LocalModule
from ondevice_trgl.model.store import shape_of

_OPAQUE = "object"


def likeness(module: LocalModule) -> str:
    """A fingerprint: modules that share it run the same operators on the same shapes, whatever their weights are.

    Layers that torch.nn does not define may differ in what cannot be seen from outside: each counts as one of its kind,
    and `is_lasting` says no.
    """
    record = [list(module.in_shape), [_described(module, node) for node in _numbered(module.graph)]]
    text = json.dumps(record, default=str)
    name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return f"{_OPAQUE}-{name}" if f'"{_OPAQUE}:' in text else name


def is_lasting(fingerprint: str) -> bool:
    """Whether a fingerprint means the same in another process."""
    return not fingerprint.startswith(_OPAQUE)


def _numbered(graph: fx.Graph) -> list[fx.Node]:
    for number, node in enumerate(graph.nodes):
        node.meta["number"] = number
    return list(graph.nodes)


def _described(module: LocalModule, node: fx.Node) -> list[Any]:
    target: Any = node.target
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        target = _layer(layer)
        modes = [
            [number, mode] for number, one in enumerate(layer.modules()) for kept, mode in module.kept if kept is one
        ]
        target += [modes] if modes else []
    elif node.op == "get_attr":
        target = _attribute(operator.attrgetter(str(node.target))(module))
    elif node.op == "call_function":
        target = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"
    arguments = fx.map_arg((node.args, node.kwargs), lambda other: f"%{other.meta['number']}")
    shape = node.meta.get("shape", ())[1:]
    return [node.op, target, str(arguments), list(shape), str(node.meta.get("dtype"))]


def _layer(layer: nn.Module) -> list[Any]:
    kind = type(layer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if not kind.__module__.startswith("torch.nn.modules."):
        name = f"{_OPAQUE}:{id(layer)}"
    return [name, layer.extra_repr(), [[n, *_attribute(t)] for n, t in layer.state_dict(keep_vars=True).items()]]


def _attribute(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return [list(shape_of(value)), str(value.dtype), value.requires_grad]
    return [str(value)]
