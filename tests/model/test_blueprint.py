"""A network written as JSON and read back is the same network, and a file that says more than that is refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ondevice_trgl.durable import write_json
from ondevice_trgl.errors import DamagedFileError, PartitionError
from ondevice_trgl.model.blueprint import NoBlueprint, from_blueprint, to_blueprint
from ondevice_trgl.model.partition import group
from ondevice_trgl.model.store import shape_of, state_of
from ondevice_trgl.model.trace import Chain, trace
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.run.run_dir import BLUEPRINT, read_json

Record = dict[str, Any]


class Encoder(nn.Module):
    """A transformer block over rows of pixels, with what ViT has: a class token, dropout, pre-norm attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 12)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, dropout=0.2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Dropout(0.3), nn.Linear(24, 12))
        self.classifier = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.embed(x.mean(1))
        z = torch.cat([self.token.expand(z.shape[0], -1, -1), z], dim=1)
        y = self.norm1(z)
        z = z + self.attention(y, y, y, need_weights=False)[0]
        z = z + self.mlp(self.norm2(z))
        return self.classifier(z[:, 0])  # type: ignore[no-any-return]


class Tied(nn.Module):
    """One weight in two layers, one layer called twice, and one that never is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.b.weight = self.a.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = self.b(torch.relu(self.a(x.mean((1, 2)))))
        return self.c(functional.gelu(self.c(z)).to(torch.float32))  # type: ignore[no-any-return]


class Moody(nn.Module):
    """Reads the train mode itself; has a frozen layer, a buffer, and a layer without bias."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.frozen = nn.Conv2d(6, 6, 1).requires_grad_(False)
        self.classifier = nn.Linear(6, 3)
        self.register_buffer("offset", torch.randn(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        z = functional.dropout(self.norm(self.conv(x)) + self.offset, 0.5, self.training)
        return self.classifier(self.frozen(z).flatten(2).mean(-1))  # type: ignore[no-any-return]


def zoo(name: str) -> Callable[[], nn.Module]:
    return lambda: build_model(name, num_classes=3, in_shape=(1, 8, 8))


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet-small": zoo("resnet-small"),
    "resnet20": zoo("resnet20"),
    "resnet-preact-3x4": zoo("resnet-preact-3x4"),
    "encoder": Encoder,
    "tied": Tied,
    "moody": Moody,
}


def chain_of(model: nn.Module) -> Chain:
    return trace(model, torch.randn(2, 1, 8, 8))


def through_json(chain: Chain) -> Chain:
    return from_blueprint(json.loads(json.dumps(to_blueprint(chain), allow_nan=False)))


def losses(chain: Chain, mode: bool, weights: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The output of every module of `chain` after `weights` were filled in, and the gradients of the last."""
    modules = group(chain, tuple(range(len(chain.segments) + 1))).modules
    for module in modules:
        for name, tensor in state_of(module).items():
            tensor.data = weights[name].clone()
        module.train(mode)
    torch.manual_seed(5)
    outputs = [torch.randn(4, 1, 8, 8)]
    for module in modules:
        outputs.append(module(outputs[-1]))
    outputs[-1].square().sum().backward()
    grads = {name: p.grad for module in modules for name, p in module.named_parameters() if p.grad is not None}
    return outputs, grads


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("net", NETS)
def test_it_comes_back_bit_for_bit(net: str, mode: bool) -> None:
    torch.manual_seed(3)
    model = NETS[net]()
    chain = chain_of(model)
    again = through_json(chain)
    assert again.model is not chain.model
    assert [(s.name, s.ends, s.out_shape) for s in again.segments] == [
        (s.name, s.ends, s.out_shape) for s in chain.segments
    ]
    bounds = tuple(range(len(chain.segments) + 1))
    assert group(again, bounds).to_dict() == group(chain, bounds).to_dict()
    weights = {name: tensor.clone() for name, tensor in state_of(model).items()}
    (outputs, grads), (same, same_grads) = losses(chain, mode, weights), losses(again, mode, weights)
    assert all(torch.equal(a, b) for a, b in zip(outputs, same, strict=True))
    assert grads
    assert grads.keys() == same_grads.keys()
    assert all(torch.equal(grads[name], same_grads[name]) for name in grads)


def test_tied_weights_stay_one_tensor_and_what_is_never_called_is_left_out() -> None:
    model = through_json(chain_of(Tied())).model
    a, b = model.get_submodule("a"), model.get_submodule("b")
    assert a.weight is b.weight
    assert a.bias is not b.bias
    assert "unused" not in dict(model.named_modules())


def test_frozen_stays_frozen() -> None:
    again = through_json(chain_of(Moody())).model
    assert {name for name, p in again.named_parameters() if not p.requires_grad} == {"frozen.weight", "frozen.bias"}


def test_the_train_mode_is_read_anew() -> None:
    record = to_blueprint(chain_of(Moody()))
    assert [node["target"] for node in record["nodes"] if node["op"] == "get_attr"] == ["training", "offset"]
    (module,) = group(from_blueprint(record), (0, 1)).modules
    for tensor in state_of(module).values():
        tensor.data = torch.ones(shape_of(tensor), dtype=tensor.dtype)
    x = torch.ones(2, 1, 8, 8)
    assert not torch.equal(module.train()(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


def test_it_holds_no_weights() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.Linear(512, 3))
    assert len(json.dumps(to_blueprint(chain_of(model)))) < 5_000 < sum(p.numel() for p in model.parameters())


class Constant(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor(2.0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


class Hidden(Tied):
    """A buffer that the state dict leaves out."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


class Own(nn.Module):
    """A leaf that is not torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Straight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return _Sign.apply(self.linear(x))  # type: ignore[no-any-return,no-untyped-call]


def hooked() -> nn.Module:
    model = Tied()
    model.a.register_forward_hook(lambda module, args, output: output * 2)
    return model


def encoder_layer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # holds a function: its activation
    return nn.Sequential(nn.Flatten(1, 2), layer, nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize("make", [Constant, Hidden, encoder_layer])
def test_tables_constants_and_containers_of_torch_are_carried(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    chain = chain_of(make())
    (module,) = group(chain, (0, len(chain.segments))).modules
    again = from_blueprint(json.loads(json.dumps(to_blueprint(chain))))
    (copied,) = group(again, (0, len(chain.segments))).modules
    assert state_of(copied).keys() == state_of(module).keys()
    for name, tensor in state_of(copied).items():
        tensor.data = state_of(module)[name].detach().clone()
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(copied.eval()(x), module.eval()(x))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: nn.Sequential(Own(), Tied()), r"0 is a .*\.Own"),
        (hooked, "a has hooks"),
        (lambda: nn.Sequential(nn.Flatten(), Straight(), nn.Linear(64, 3)), r"calls .*\._Sign_apply"),
    ],
    ids=["own leaf", "hook", "own autograd function"],
)
def test_what_json_cannot_say_has_no_blueprint(make: Callable[[], nn.Module], what: str) -> None:
    with pytest.raises(NoBlueprint, match=what):
        to_blueprint(chain_of(make()))


@pytest.fixture(scope="module")
def good() -> Record:
    """With a function, a method, an attribute, a layer, a constant."""

    class Net(Moody):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(x.shape[0], 1, 8, 8).mT.to(dtype=torch.float32))

    record: Record = json.loads(json.dumps(to_blueprint(chain_of(Net()))))
    from_blueprint(record)
    return record


def node_of(record: Record, op: str, target: str = "") -> Record:
    node: Record = next(n for n in record["nodes"] if n["op"] == op and target in n["target"])
    return node


FUNCTIONS = [
    "os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.__import__", "torch.load", "torch.save",
    "torch.from_file", "torch.hub.load", "torch.os", "torch.Tensor", "torch.nn.functional.torch",
    "torch.nn.functional.importlib", "torch.nn.functional.handle_torch_function", "operator.call",
    "operator.attrgetter", "_operator.methodcaller", "operator.__name__", "operator.no_such", "subprocess.run", "add",
]  # fmt: skip
NAMES = ["", "x y", "x=print()", "x\n", "x)#", 'a") or print("', "a..b", "*x", "größe"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_are_no_operators_of_torch_are_refused(good: Record, name: str) -> None:
    record = copy.deepcopy(good)
    node_of(record, "call_function", "dropout")["target"] = name
    with pytest.raises(DamagedFileError):
        from_blueprint(record)


@pytest.mark.parametrize("name", ["__class__", "_backward_hooks", "numpy", "untyped_storage", "apply_", "no_such"])
def test_methods_that_lead_out_of_tensors_are_refused(good: Record, name: str) -> None:
    record = copy.deepcopy(good)
    node_of(record, "call_method", "view")["target"] = name
    with pytest.raises(DamagedFileError, match=name):
        from_blueprint(record)


@pytest.mark.parametrize("name", ["__class__", "_typed_storage", "numpy", {"node": "x"}, None])
def test_attributes_that_lead_out_of_tensors_are_refused(good: Record, name: object) -> None:
    record = copy.deepcopy(good)
    node_of(record, "call_function", "getattr")["args"][1] = name
    with pytest.raises(DamagedFileError, match="no attribute"):
        from_blueprint(record)


@pytest.mark.parametrize("op", ["placeholder", "call_method", "call_module", "get_attr", "call_function"])
@pytest.mark.parametrize("name", NAMES)
def test_names_that_would_be_code_are_refused(good: Record, op: str, name: str) -> None:
    record = copy.deepcopy(good)
    node_of(record, op)["target"] = name
    with pytest.raises(DamagedFileError):
        from_blueprint(record)


@pytest.mark.parametrize("name", [*NAMES[:-1], "import"])
def test_keywords_that_would_be_code_are_refused(good: Record, name: str) -> None:
    record = copy.deepcopy(good)
    node_of(record, "call_method", "to")["kwargs"] = {name: 1}
    with pytest.raises(DamagedFileError):
        from_blueprint(record)


@pytest.mark.parametrize("path", ["__class__", "conv.forward", "conv.__init__.__globals__"])
def test_only_tensors_of_the_network_are_read(good: Record, path: str) -> None:
    record = copy.deepcopy(good)
    node_of(record, "get_attr", "offset")["target"] = path
    with pytest.raises(DamagedFileError, match="no tensor of the network"):
        from_blueprint(record)


@pytest.mark.parametrize(
    "kind",
    [
        "os.system", "builtins.eval", "subprocess.Popen", "torch.nn.Linear", "torch.nn.modules.no_such.Linear",
        "torch.nn.modules.linear.NoSuch", "torch.nn.modules.linear.math", "torch.nn.modules.linear.Tensor",
        "torch.nn.modules.linear.init", "ondevice_trgl.model.resnets.ResNet", "Linear",
    ],
)  # fmt: skip
def test_classes_that_are_no_layers_of_torch_are_refused(good: Record, kind: str) -> None:
    record = copy.deepcopy(good)
    record["layers"]["classifier"]["class"] = kind
    with pytest.raises(DamagedFileError):
        from_blueprint(record)


@pytest.mark.parametrize("dtype", ["load", "nn", "no_such", "Tensor"])
def test_a_dtype_is_a_dtype(good: Record, dtype: str) -> None:
    for place in ("argument", "tensor", "input"):
        record = copy.deepcopy(good)
        if place == "argument":
            node_of(record, "call_method", "to")["kwargs"]["dtype"] = {"dtype": dtype}
        elif place == "tensor":
            record["layers"]["conv"]["tensors"]["weight"]["dtype"] = dtype
        else:
            record["in_dtype"] = dtype
        with pytest.raises(DamagedFileError):
            from_blueprint(record)


def test_nothing_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: Record) -> None:
    """What would be run if names went into source as they are: see whether it is."""
    monkeypatch.chdir(tmp_path)
    code = "x=__import__('pathlib').Path('ran').touch()"
    record = copy.deepcopy(good)
    node_of(record, "placeholder")["target"] = code
    with pytest.raises(DamagedFileError):
        group(from_blueprint(record), (0, 1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["layers", "constants", "nodes", "in_shape", "in_dtype", "segment_names"])
@pytest.mark.parametrize("value", [None, 3, [1], {"a": 1}, "x"])
def test_a_torn_record_is_damaged_whatever_is_wrong(good: Record, key: str, value: object) -> None:
    for record in ({**good, key: value}, {name: part for name, part in good.items() if name != key}):
        if key == "in_shape" and record.get(key) == [1]:
            continue  # as good a shape as any
        with pytest.raises(DamagedFileError):
            from_blueprint(record)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = self.second(functional.softmax(y.masked_fill(y < 0.0, float("-inf")).clamp(min=-1e30), -1))
        return out


def test_a_network_with_an_infinity_goes_through_its_file(tmp_path: Path) -> None:
    model, x = Masked(), torch.randn(2, 8)
    write_json(tmp_path / BLUEPRINT, to_blueprint(trace(model, x)))
    again = from_blueprint(read_json(tmp_path / BLUEPRINT))
    assert float("-inf") in [value for node in again.graph.nodes for value in node.args]


@pytest.mark.parametrize("of", [2, "x", [], None, {"tuple": []}])
def test_methods_are_those_of_tensors(good: Record, of: object) -> None:
    good = copy.deepcopy(good)
    node = next(node for node in good["nodes"] if node["op"] == "call_method")
    node["args"][0] = of
    with pytest.raises(DamagedFileError):
        from_blueprint(good)


def test_a_graph_that_is_no_code_is_refused(good: Record) -> None:
    good = copy.deepcopy(good)
    good["nodes"].insert(1, {**good["nodes"][1], "name": "odd", "op": "call_function", "target": "_operator.iadd"})
    good["nodes"][1] |= {"args": [2, 3], "kwargs": {}}
    with pytest.raises((DamagedFileError, PartitionError)):
        group(from_blueprint(good), [0, 1])


@pytest.mark.parametrize("shape", [[2**62, 4], [-1], ["4"], [2.5], "44", [True], {"a": 1}])
@pytest.mark.parametrize("where", ["in_shape", "node", "tensor"])
def test_shapes_are_shapes(good: Record, shape: object, where: str) -> None:
    good = copy.deepcopy(good)
    if where == "in_shape":
        good["in_shape"] = shape
    elif where == "node":
        next(node for node in good["nodes"] if node["op"] == "call_module")["shape"] = shape
    else:
        layer = next(layer for layer in good["layers"].values() if layer["tensors"])
        next(iter(layer["tensors"].values()))["shape"] = shape
    with pytest.raises(DamagedFileError, match="shape"):
        from_blueprint(good)
