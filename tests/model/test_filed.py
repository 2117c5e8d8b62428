"""Weights in a file while a model is built: the same model to the last bit, in a fraction of the memory."""

import copy
import errno
import gc
import json
import math
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as hooks

from ondevice_trgl.errors import StorageError, UsageError
from ondevice_trgl.model.filed import SMALLEST_BYTES, FiledWeights, weights_in_file
from ondevice_trgl.model.zoo import build_model

Model = TypeVar("Model", bound=nn.Module)


def linear() -> nn.Linear:
    return nn.Linear(160, 200)


def layers() -> nn.Module:
    attention = nn.MultiheadAttention(160, 4)
    return nn.Sequential(linear(), nn.Conv2d(64, 64, 3), nn.LSTM(100, 100), nn.Embedding(400, 50), attention)


def initialised_at_the_end() -> nn.Module:
    model = nn.Sequential(linear(), nn.BatchNorm1d(200), linear())
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.orthogonal_(layer.weight)
            layer.weight.data.mul_(0.5)
    return model


def copied() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 4, 256), 3, enable_nested_tensor=False)


def halved() -> nn.Module:
    return nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300)).to(torch.bfloat16)


def channels_last() -> nn.Module:
    return nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def replaced() -> nn.Module:
    model = nn.Sequential(linear(), linear())
    first, second = (layer for layer in model if isinstance(layer, nn.Linear))
    first.weight = nn.Parameter(torch.randn(200, 160))
    second.weight.data = torch.randn(200, 160)
    return model


def loaded() -> nn.Module:
    model, other = nn.Sequential(linear(), linear()), nn.Sequential(linear(), linear())
    model[0].load_state_dict(other[0].state_dict())
    model[1].load_state_dict(other[1].state_dict(), assign=True)
    return model


class Held(nn.Module):
    """Keeps no rule: parameters and buffers are filled through the tensors that they were made of."""

    def __init__(self) -> None:
        super().__init__()
        weight, turned, table = torch.empty(200, 160), torch.randn(160, 200), torch.zeros(100, 200)
        self.weight = nn.Parameter(weight)
        self.turned = nn.Parameter(turned.t())
        self.register_buffer("table", table)
        self.register_buffer("part", torch.randn(300, 200)[100:])
        self.register_buffer("nothing", None)
        self.inner = linear()
        weight.normal_()
        table[:, 1::2] = 1.0
        turned[0] = 3.0


def held() -> nn.Module:
    return nn.Sequential(Held())


BUILDERS: list[Callable[[], nn.Module]] = [
    layers,
    initialised_at_the_end,
    copied,
    halved,
    channels_last,
    replaced,
    loaded,
    held,
    lambda: build_model("resnet56", num_classes=10, in_shape=(3, 32, 32)),
]


def large(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t for name, t in named if t.untyped_storage().nbytes() >= SMALLEST_BYTES}


def built(build: Callable[[], Model], folder: Path) -> tuple[Model, FiledWeights]:
    with weights_in_file(folder) as weights:
        model = build()
        weights.take(model)
    return model, weights


@pytest.mark.parametrize("build", BUILDERS)
def test_a_model_is_the_same_and_all_that_is_large_is_in_the_file(
    tmp_path: Path, build: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(3)
    plain, after = build(), torch.get_rng_state()
    torch.manual_seed(3)
    filed, weights = built(build, tmp_path)
    assert torch.equal(torch.get_rng_state(), after)
    assert list(filed.state_dict()) == list(plain.state_dict())
    for (name, one), two in zip(plain.state_dict(keep_vars=True).items(), filed.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
        assert one.stride() == two.stride(), name
    assert [name for name, p in filed.named_parameters() if p.requires_grad] == [n for n, _ in plain.named_parameters()]
    outside = [name for name, tensor in large(filed).items() if not weights.holds(tensor)]
    assert outside == (["0.part"] if build is held else [])  # a view, whose base still holds the memory
    assert list(tmp_path.iterdir()) == []


def test_what_is_small_stays_where_it_is(tmp_path: Path) -> None:
    model, weights = built(linear, tmp_path)
    assert [name for name, p in model.named_parameters() if weights.holds(p)] == ["weight"]


def test_it_trains_as_ever_also_when_the_pages_were_dropped(tmp_path: Path) -> None:
    results = []
    for filed in (False, True):
        torch.manual_seed(0)
        model, weights = built(layers_that_run, tmp_path) if filed else (layers_that_run(), None)
        for _ in range(2):
            if weights is not None:
                weights.release()
            loss = functional.cross_entropy(model(torch.ones(4, 160)), torch.zeros(4, dtype=torch.int64))
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.add_(parameter.grad, alpha=-0.1)
                    parameter.grad = None
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def layers_that_run() -> nn.Module:
    return nn.Sequential(linear(), nn.ReLU(), nn.Linear(200, 100))


def test_the_mapping_lives_as_long_as_the_tensors(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = linear().weight
    torch.manual_seed(1)
    model, weights = built(linear, tmp_path)
    weights.release()
    del weights
    gc.collect()
    assert torch.equal(model.weight, expected)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(200, 160), nn.Linear(160, 200)
        self.decoder.weight = self.embedding.weight
        self.flat = nn.Parameter(self.embedding.weight.data.view(160, 200))  # the same memory, once it is in the file


def test_ties_hold(tmp_path: Path) -> None:
    model, weights = built(Tied, tmp_path)
    assert model.decoder.weight is model.embedding.weight
    assert all(weights.holds(p) for p in (model.embedding.weight, model.flat))
    with torch.no_grad():
        model.embedding.weight.fill_(2.0)
    weights.release()
    assert torch.equal(model.flat, torch.full((160, 200), 2.0))


def test_memory_that_something_else_holds_too_stays(tmp_path: Path) -> None:
    shared = torch.zeros(200, 160)

    def build() -> nn.Linear:
        model = linear()
        model.weight = nn.Parameter(shared)
        return model

    model, weights = built(build, tmp_path)
    shared.fill_(2.0)
    assert not weights.holds(model.weight)
    assert torch.equal(model.weight, torch.full((200, 160), 2.0))


def test_copies_made_afterwards_are_plain(tmp_path: Path) -> None:
    model, weights = built(linear, tmp_path)
    again = copy.deepcopy(model)
    assert not any(weights.holds(p) for p in again.parameters())
    assert torch.equal(again.weight, model.weight)


def hooks_left() -> int:
    return sum(
        len(getattr(hooks, f"_global_{kind}"))
        for kind in (
            "buffer_registration_hooks",
            "module_registration_hooks",
            "parameter_registration_hooks",
            "forward_hooks",
            "forward_pre_hooks",
        )
    )


def test_torch_is_left_as_it_was_whatever_happens(tmp_path: Path) -> None:
    def broken() -> nn.Module:
        linear()
        raise ZeroDivisionError

    before = hooks_left()
    with pytest.raises(ZeroDivisionError):
        built(broken, tmp_path)
    model, weights = built(linear, tmp_path)
    with pytest.raises(RuntimeError), weights.dropped_as_read():
        model(torch.ones(1, 99))
    assert hooks_left() == before
    assert not torch.overrides._get_current_function_mode_stack()
    with weights.dropped_as_read():
        assert torch.equal(model(torch.ones(1, 160)), model(torch.ones(1, 160)))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "ftruncate"])
def test_a_full_disk_is_told_whatever_the_models_code_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, wrapped: bool
) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def build() -> nn.Module:
        try:
            return linear()
        except Exception as error:
            if wrapped:
                raise UsageError("the model cannot be built") from error
            raise

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError, match="No space left") as caught:
        built(build, tmp_path)
    assert str(tmp_path) in caught.value.message


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_a_limit_on_the_size_of_files_is_an_error_and_no_signal(tmp_path: Path, run_python: Callable[..., str]) -> None:
    out = run_python(
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from ondevice_trgl.errors import StorageError\n"
        "from ondevice_trgl.model.filed import weights_in_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (80 << 20, 80 << 20))\n"
        "try:\n"
        f"    with weights_in_file(Path({str(tmp_path)!r})):\n"
        "        torch.nn.Linear(4096, 8192)\n"
        "except StorageError as error:\n"
        "    print(error.message)\n"
    )
    assert "File too large" in out


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        built(linear, tmp_path / "none")


def test_where_nothing_can_be_mapped_the_model_is_built_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **options: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mmap, "mmap", refused)
    torch.manual_seed(0)
    model, weights = built(layers, tmp_path)
    torch.manual_seed(0)
    plain = layers()
    weights.release()
    assert not any(weights.holds(p) for p in model.parameters())
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), plain.parameters(), strict=True))


def test_without_reserving_blocks_it_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    model, weights = built(linear, tmp_path)
    assert weights.holds(model.weight)
    monkeypatch.delattr(os, "posix_fallocate")
    model, weights = built(linear, tmp_path)
    assert weights.holds(model.weight)


MEASURED = """
import copy, json, torch
from pathlib import Path
from torch import nn
from ondevice_trgl.device.allocator import tune
from ondevice_trgl.device.meter import RssMeter
from ondevice_trgl.model.filed import weights_in_file
from ondevice_trgl.model.store import state_of
from ondevice_trgl.model.tensorfile import write_tensors
from ondevice_trgl.model.trace import trace

def build():
    layers = [layer for _ in range(SIZE) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(1024, 3))
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
    return model

folder = Path(FOLDER)
tune("auto")  # as the processes do that build models: what is freed is given back
torch.set_num_threads(1)
trace(nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 3)), torch.ones(2, 1024))  # what the first of all costs
found = {}
try:
    meter = RssMeter()
except OSError:
    print(json.dumps(found))
    raise SystemExit
def peak(what):
    global before
    found[what] = meter.peak_bytes() - before
    meter.reset()
    before = meter.current_bytes()
before = meter.current_bytes()
meter.reset()
with weights_in_file(folder) as weights:
    model = build()
peak("built")
with weights_in_file(folder):
    layer = nn.Linear(1024, 1024)
    copies = [copy.deepcopy(layer) for _ in range(SIZE)]
peak("copied")
with weights.dropped_as_read():
    trace(model, torch.ones(2, 1024))
peak("traced")
write_tensors(folder / "w", state_of(model), written=weights.release)
peak("written")
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_little_of_it_is_ever_in_memory(tmp_path: Path, run_python: Callable[..., str]) -> None:
    layers = 20
    weights = layers * 1024 * 1024 * 4
    out = run_python(MEASURED.replace("SIZE", str(layers)).replace("FOLDER", repr(str(tmp_path))))
    found = json.loads(out)
    if not found:
        pytest.skip("the peak cannot be measured here")
    assert list(found) == ["built", "copied", "traced", "written"]
    assert max(found.values()) < weights // 3, found
    assert math.isclose((tmp_path / "w").stat().st_size, weights, rel_tol=0.01)
