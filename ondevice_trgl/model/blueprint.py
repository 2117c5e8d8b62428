"""A traced network as JSON, and back: the layers and the graph, without weights and without the code they came from.

The process that trains needs neither torchvision nor whatever else a model's own module imports. Nothing is
unpickled: layers are of `torch.nn`, functions of torch and `operator`; whatever else a network holds has no blueprint.
"""

import builtins
import dataclasses
import importlib
import keyword
import math
import operator
import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from ondevice_trgl.errors import DamagedFileError, PartitionError
from ondevice_trgl.model.modes import Modes
from ondevice_trgl.model.passes import BATCHES
from ondevice_trgl.model.store import evicted, shape_of
from ondevice_trgl.model.trace import Chain, chain_from
from ondevice_trgl.typed import value_of

_LAYERS = "torch.nn.modules."
_FUNCTIONS: dict[str, Any] = {
    "torch": torch,
    "torch.nn.functional": torch.nn.functional,
    "torch._C._nn": torch._C._nn,
    "_operator": operator,
    "operator": operator,
}
_NO_OPERATORS = {"call", "attrgetter", "itemgetter", "methodcaller", "handle_torch_function", "from_file"}
"""Of those modules, but they call what they are given, or open files."""
_NO_METHODS = {"numpy", "storage", "untyped_storage", "apply_", "map_", "map2_"}
"""Of tensors, but they lead to something that is no tensor."""
_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)
_OF_LAYERS = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"}
_HOOKS = {name for name in nn.Module().__dict__ if name not in _OF_LAYERS}


class NoBlueprint(PartitionError):  # noqa: N818 -- a network without one is no fault of anyone's
    """The network holds something that JSON cannot say; it has to be built by its own code."""


def to_blueprint(chain: Chain) -> dict[str, Any]:
    """`chain` as JSON-ready values. Raises NoBlueprint."""
    names: dict[int, str] = {}
    layers = {}
    for node in chain.graph.nodes:
        if node.op == "call_module" and node.target not in layers:
            layers[str(node.target)] = _layer(chain.root.get_submodule(str(node.target)), str(node.target), names)
    constants = {}
    for node in chain.graph.nodes:
        if node.op == "get_attr" and node.target != "training":
            value = operator.attrgetter(str(node.target))(chain.root)
            constants[str(node.target)] = _tensor(value, str(node.target), names)
    return {
        "layers": layers,
        "constants": constants,
        "nodes": [_node(node) for node in chain.graph.nodes],
        "modes": chain.modes.kept,
        "in_shape": list(chain.in_shape),
        "in_dtype": _name_of(chain.in_dtype),
        "segment_names": [[segment.name, list(segment.ends)] for segment in chain.segments],
        "trunk": chain.trunk,
        "prefix": chain.prefix,
    }


def _tensor(value: Tensor, name: str, names: dict[int, str]) -> dict[str, Any]:
    if value._backward_hooks:
        raise NoBlueprint(f"{name} has hooks")
    first = names.setdefault(id(value), name)
    return {
        "shape": list(shape_of(value)),
        "dtype": _name_of(value.dtype),
        "trained": isinstance(value, nn.Parameter),
        "grad": value.requires_grad,
        "same_as": None if first == name else first,
    }


def _layer(layer: nn.Module, path: str, names: dict[int, str]) -> dict[str, Any]:
    kind = type(layer)
    if not kind.__module__.startswith(_LAYERS) or layer._non_persistent_buffers_set:
        raise NoBlueprint(f"{path} is a {kind.__module__}.{kind.__qualname__}")
    own = {name: value for name, value in layer.__dict__.items() if name not in _HOOKS | _OF_LAYERS}
    if any(hooks for name, hooks in layer.__dict__.items() if name in _HOOKS and isinstance(hooks, dict)):
        raise NoBlueprint(f"{path} has hooks")
    tensors = {**layer._parameters, **layer._buffers}
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "own": {name: _plain(value, f"{path}.{name}") for name, value in own.items()},
        "tensors": {
            name: None if value is None else _tensor(value, f"{path}.{name}", names) for name, value in tensors.items()
        },
        "parameters": list(layer._parameters),
        "children": {
            name: _layer(child, f"{path}.{name}", names) for name, child in layer._modules.items() if child is not None
        },
    }


def _node(node: fx.Node) -> dict[str, Any]:
    target: Any = node.target
    if node.op == "call_function":
        target = _function_name(node.target)
    if fault := _fault(node.op, target, node.args, node.kwargs):
        raise NoBlueprint(fault)
    return {
        "name": node.name,
        "op": node.op,
        "target": target,
        "args": [_plain(value, node.name) for value in node.args],
        "kwargs": {name: _plain(value, node.name) for name, value in node.kwargs.items()},
        "shape": list(node.meta["shape"]) if "shape" in node.meta else None,
        "dtype": _name_of(node.meta["dtype"]) if "dtype" in node.meta else None,
        "rows": node.meta.get("rows", False),
    }


def _function_name(function: Any) -> str:
    if function is getattr:
        return "builtins.getattr"
    name = getattr(function, "__name__", "")
    for place, home in _FUNCTIONS.items():
        if getattr(home, name, None) is function:
            return f"{place}.{name}"
    raise NoBlueprint(f"the network calls {getattr(function, '__module__', '')}.{name}")


def _fault(op: str, target: str, args: Any, kwargs: Any) -> str:
    """What is wrong with a node: torch.fx writes these words into source that it runs. "" where nothing is."""
    names = [*kwargs, *([target] if op == "placeholder" else [])]
    if not _PATH.fullmatch(target) or not all(name.isidentifier() and not keyword.iskeyword(name) for name in names):
        return f"{[target, *names]} are no names"
    of = args[0] if op == "call_method" and args else None
    if op == "call_method" and not (isinstance(of, fx.Node) or (isinstance(of, dict) and of.keys() == {"node"})):
        return f"{target} is called of what is no tensor"
    if op == "call_method" and (target.startswith("_") or target in _NO_METHODS or not hasattr(Tensor, target)):
        return f"{target} is no method for a graph"
    if target == "builtins.getattr":
        what = args[1] if len(args) > 1 else None
        if not isinstance(what, str) or what.startswith("_") or callable(getattr(Tensor, what, None)):
            return f"{what} is no attribute for a graph"
    elif op == "call_function":
        place, _, name = target.rpartition(".")
        # of torch itself operators alone: torch.load and its like have no place in a graph
        known = place in _FUNCTIONS and (place != "torch" or hasattr(torch._C._VariableFunctions, name))
        function = getattr(_FUNCTIONS[place], name, None) if known else None
        if name.startswith("_") or name in _NO_OPERATORS or isinstance(function, type) or not callable(function):
            return f"{target} is no operator of torch"
    return ""


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise DamagedFileError(f"the blueprint has {name} where a dtype belongs")
    return found


def _shape(given: Any, of: str) -> tuple[int, ...]:
    """The shape `given`. Raises ValueError for one that no tensor has."""
    shape: tuple[int, ...] = value_of(tuple[int, ...], given, f"the shape of {of}")
    if min(shape, default=0) < 0 or math.prod(size for size in shape if size) >= 2**62:
        raise ValueError(f"{of} has a shape that no tensor has")
    return shape


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON, everything but numbers, text and lists behind a tag."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": _name_of(value)}
    if isinstance(value, slice):
        return {"slice": [_plain(part, where) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple):
        return {"tuple": [_plain(item, where) for item in value]}
    if isinstance(value, list):
        return [_plain(item, where) for item in value]
    raise NoBlueprint(f"{where} holds a {type(value).__name__}")


def from_blueprint(record: dict[str, Any]) -> Chain:
    """The chain again, its tensors evicted. Raises DamagedFileError."""
    try:
        return _Builder(record).chain()
    except DamagedFileError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ImportError, AssertionError, RuntimeError) as error:
        raise DamagedFileError(f"the blueprint cannot be read: {error!r}") from error


class _Builder:
    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record
        self.root = nn.Module()
        self.tensors: dict[str, Tensor] = {}
        self.nodes: dict[str, fx.Node] = {}

    def chain(self) -> Chain:
        for path, layer in self.record["layers"].items():
            holder, name = self._holder(path)
            holder.add_module(name, self._layer(layer, path))
        for path, tensor in self.record["constants"].items():
            holder, name = self._holder(path)
            self._attach(holder, name, self._tensor(tensor, path), is_parameter=tensor["trained"])
        graph = fx.Graph()
        for node in self.record["nodes"]:
            target = node["target"]
            if fault := _fault(node["op"], target, node["args"], node["kwargs"]):
                raise DamagedFileError(f"the blueprint cannot be used: {fault}")
            if node["op"] == "get_attr" and target != "training" and target not in self.record["constants"]:
                raise DamagedFileError(f"the blueprint reads {target}, which is no tensor of the network")
            if node["op"] == "call_function":
                place, _, name = target.rpartition(".")
                target = builtins.getattr if place == "builtins" else getattr(_FUNCTIONS[place], name)
            args = tuple(self._value(value) for value in node["args"])
            kwargs = {name: self._value(value) for name, value in node["kwargs"].items()}
            made = graph.create_node(node["op"], target, args, kwargs, name=node["name"])
            if node["shape"] is not None:
                made.meta["shape"] = _shape(node["shape"], node["name"])
                made.meta["dtype"] = _dtype(node["dtype"])
                made.meta["rows"] = bool(node.get("rows", made.meta["shape"][:1] == BATCHES[:1]))
            self.nodes[node["name"]] = made
        names = list(value_of(tuple[tuple[str, tuple[str, ...]], ...], self.record["segment_names"], "segment_names"))
        dtype = _dtype(self.record["in_dtype"])
        shape = _shape(self.record["in_shape"], "in_shape")
        modes = Modes({path: bool(mode) for path, mode in self.record.get("modes", {}).items()})
        apart = int(self.record.get("trunk", len(names))) < len(names)
        chain = chain_from(self.root, self.root, graph, modes, shape, dtype, names, apart=apart)
        return dataclasses.replace(chain, prefix=int(self.record.get("prefix", 0)))

    def _holder(self, path: str) -> tuple[nn.Module, str]:
        *parts, name = path.split(".")
        module = self.root
        for part in parts:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        return module, name

    def _layer(self, record: dict[str, Any], path: str) -> nn.Module:
        place, _, kind = record["class"].rpartition(".")
        found = getattr(importlib.import_module(place), kind) if place.startswith(_LAYERS) else None
        if not isinstance(found, type) or not issubclass(found, nn.Module) or found.__module__ != place:
            raise DamagedFileError(f"the blueprint names {record['class']}, which is no layer of torch.nn")
        layer = found.__new__(found)
        nn.Module.__init__(layer)
        for name, value in record["own"].items():
            layer.__dict__[name] = self._value(value)
        for name, tensor in record["tensors"].items():
            value = None if tensor is None else self._tensor(tensor, f"{path}.{name}")
            self._attach(layer, name, value, is_parameter=name in record["parameters"])
        for name, child in record["children"].items():
            layer.add_module(name, self._layer(child, f"{path}.{name}"))
        return layer

    @staticmethod
    def _attach(layer: nn.Module, name: str, value: Tensor | None, *, is_parameter: bool) -> None:
        if is_parameter:
            assert value is None or isinstance(value, nn.Parameter)
            layer.register_parameter(name, value)
        else:
            layer.register_buffer(name, value)

    def _tensor(self, record: dict[str, Any], path: str) -> Tensor:
        if record["same_as"] is not None:
            return self.tensors[record["same_as"]]
        value = torch.empty(0, dtype=_dtype(record["dtype"]))
        tensor = nn.Parameter(value, requires_grad=record["grad"]) if record["trained"] else value
        self.tensors[path] = evicted(tensor, _shape(record["shape"], path))
        return tensor

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(item) for item in value]
        if not isinstance(value, dict):
            return value
        ((tag, inside),) = value.items()
        match tag:
            case "node":
                return self.nodes[inside]
            case "dtype":
                return _dtype(inside)
            case "slice":
                return slice(*(self._value(part) for part in inside))
            case "tuple":
                return tuple(self._value(item) for item in inside)
        raise DamagedFileError(f"the blueprint holds an unknown {tag!r}")
