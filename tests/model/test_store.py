"""Modules on disk: what is loaded equals what was saved, and what is evicted holds no memory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ondevice_trgl.errors import DamagedFileError
from ondevice_trgl.model.heads import head_behind
from ondevice_trgl.model.partition import Partition, partition
from ondevice_trgl.model.store import ModuleStore, aliases_of, evict, state_of
from ondevice_trgl.model.tensorfile import write_tensors
from ondevice_trgl.model.zoo import build_model

CPU = torch.device("cpu")


class Tied(nn.Module):
    """Tied weights, a layer that is never called, a buffer that is not saved."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.b.weight = self.a.weight
        self.unused = nn.Linear(2, 2)
        self.last = nn.Linear(width, 3)
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.c(self.b(self.a(x))))  # type: ignore[no-any-return]


def saved(parts: Partition, store: ModuleStore) -> list[nn.Module | None]:
    heads: list[nn.Module | None] = [head_behind(m, "mlp", 3) for m in parts.modules[:-1]]
    heads.append(None)
    for index, (module, head) in enumerate(zip(parts.modules, heads, strict=True)):
        store.save(index, module, head, {"epoch": index})
    write_tensors(store.folder.parent / "staged.safetensors", state_of(parts.chain.model))
    store.staged = store.folder.parent / "staged.safetensors"
    return heads


def test_load_gives_back_what_was_saved(tmp_path: Path) -> None:
    model = build_model("resnet-small", num_classes=3, in_shape=(1, 8, 8))
    model(torch.randn(4, 1, 8, 8))
    parts, store = partition(model, torch.randn(2, 1, 8, 8), 3), ModuleStore(tmp_path / "modules")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    heads = saved(parts, store)
    head_before = [tensor.clone() for tensor in state_of(heads[0]).values()] if heads[0] else []
    evict(*parts.modules, *heads)
    for index, (module, head) in enumerate(zip(parts.modules, heads, strict=True)):
        store.load(index, module, head, CPU)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert heads[0] is not None
    assert all(torch.equal(a, b) for a, b in zip(state_of(heads[0]).values(), head_before, strict=True))
    assert [store.position(index) for index in range(3)] == [{"epoch": 0}, {"epoch": 1}, {"epoch": 2}]


def test_evicted_tensors_and_their_gradients_hold_no_memory(tmp_path: Path) -> None:
    model = build_model("resnet-small", num_classes=3, in_shape=(1, 8, 8))
    parts = partition(model, torch.randn(2, 1, 8, 8), 2)
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    evict(parts.modules[0])
    assert all(t.untyped_storage().nbytes() == 0 and t.grad is None for t in state_of(parts.modules[0]).values())
    assert all(t.untyped_storage().nbytes() > 0 for t in state_of(parts.modules[1]).values())
    evict(parts.modules[0], parts.modules[1], None)
    assert sum(t.untyped_storage().nbytes() for t in state_of(model).values()) == 0


def test_loaded_tensors_are_the_networks_own_parameters_and_train(tmp_path: Path) -> None:
    model = Tied()
    parts, store = partition(model, torch.randn(2, 4)), ModuleStore(tmp_path)
    heads = saved(parts, store)
    own = {name: id(p) for name, p in model.named_parameters()}
    evict(*parts.modules)
    for index, module in enumerate(parts.modules):
        store.load(index, module, heads[index], CPU)
    assert {name: id(p) for name, p in model.named_parameters()} == own
    assert model.a.weight is model.b.weight
    model(torch.randn(3, 4)).sum().backward()
    assert model.a.weight.grad is not None


def test_optimizer_state_and_extras_are_kept_apart(tmp_path: Path) -> None:
    store, module = ModuleStore(tmp_path), nn.Linear(2, 2)
    store.save(0, module, None, {}, optim={"momentum.module.weight": torch.ones(2)}, run={"rng": torch.zeros(3)})
    assert store.load_extra(0, "optim", CPU).keys() == {"momentum.module.weight"}
    assert store.load_extra(0, "run", CPU).keys() == {"rng"}
    store.load(0, module, None, CPU)
    assert store.has(0)
    assert not store.has(1)


def test_assembled_file_is_the_state_dict_of_the_network(tmp_path: Path) -> None:
    model = Tied()
    parts, store = partition(model, torch.randn(2, 4)), ModuleStore(tmp_path / "modules")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    aliases = aliases_of(model)
    heads = saved(parts, store)
    evict(*parts.modules, *heads)
    store.assemble(tmp_path / "model.safetensors", aliases)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    Tied().load_state_dict(found)


def test_the_file_of_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    store, model = ModuleStore(tmp_path), nn.Sequential(nn.Linear(2, 2))
    store.save(0, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), None, {})
    with pytest.raises(DamagedFileError, match=r"unknown \['1\.bias', '1\.weight'\]"):
        store.load(0, model, None, CPU)
    store.save(0, nn.Sequential(nn.Linear(2, 2, bias=False)), None, {})
    with pytest.raises(DamagedFileError, match=r"missing \['0\.bias'\]"):
        store.load(0, model, None, CPU)


@pytest.mark.parametrize("evicted", [True, False])
def test_a_file_of_other_widths_or_dtypes_is_refused(tmp_path: Path, evicted: bool) -> None:
    store, module = ModuleStore(tmp_path), nn.Linear(4, 3)
    if evicted:
        evict(module)
        evict(module)
    for other in (nn.Linear(5, 3), nn.Linear(4, 3).double()):
        store.save(0, other, None, {})
        with pytest.raises(DamagedFileError, match="weight is"):
            store.load(0, module, None, CPU)
    store.save(0, nn.Linear(4, 3), None, {})
    store.load(0, module, None, CPU)
    assert module(torch.randn(2, 4)).shape == (2, 3)


def test_a_run_of_another_model_cannot_be_assembled(tmp_path: Path) -> None:
    store = ModuleStore(tmp_path / "modules")
    saved(partition(Tied(), torch.randn(2, 4)), store)
    with pytest.raises(DamagedFileError, match=r"lacks 0\.weight"):
        store.assemble(tmp_path / "out", aliases_of(nn.Sequential(nn.Linear(2, 2))))


def test_a_position_that_is_not_there_is_empty(tmp_path: Path) -> None:
    write_tensors(tmp_path / "000.safetensors", {"module.x": torch.ones(1)})
    assert ModuleStore(tmp_path).position(0) == {}


def test_pending_modules_take_their_places_together_or_not_at_all(tmp_path: Path) -> None:
    store, module = ModuleStore(tmp_path), nn.Linear(2, 1)
    for index in (0, 1):
        store.save(index, module, None, {"step": 1})
    store.save(0, module, None, {"step": 2}, pending=True)
    assert store.position(0) == {"step": 1}
    store.recover()  # killed before the second was written: nothing has happened
    assert [store.position(k)["step"] for k in (0, 1)] == [1, 1]
    assert not list(tmp_path.glob("*.pending"))
    for index in (0, 1):
        store.save(index, module, None, {"step": 3}, pending=True)
    store.commit()
    assert [store.position(k)["step"] for k in (0, 1)] == [3, 3]
    for index in (0, 1):
        store.save(index, module, None, {"step": 4}, pending=True)
    (tmp_path / "committed").write_bytes(b"")  # killed in the middle of a commit
    (tmp_path / "000.pending").replace(store.path(0))
    store.recover()
    assert [store.position(k)["step"] for k in (0, 1)] == [4, 4]
    assert [store.has_before(k) for k in (0, 1)] == [False, True]  # the first's was moved by hand
    store.forget()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000.safetensors", "001.safetensors"]
