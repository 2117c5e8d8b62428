"""Models by name."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ondevice_trgl.config import Workload
from ondevice_trgl.data.preprocessing import Preprocessing
from ondevice_trgl.errors import ConfigError, DataError, UnknownNameError, UsageError
from ondevice_trgl.model.names import check_model_name, model_names, needs_channels
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.workload import build_for


@pytest.mark.parametrize(
    ("name", "convolutions"), [("resnet-small", 15), ("resnet20", 21), ("resnet56", 57), ("resnet-preact-3x8", 7)]
)
def test_own_networks_have_the_depth_of_their_name(name: str, convolutions: int) -> None:
    model = build_model(name, num_classes=6, in_shape=(2, 9, 9))
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == convolutions
    assert model(torch.randn(2, 2, 9, 9)).shape == (2, 6)


def test_the_generator_alone_decides_the_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(build_model("resnet-small", num_classes=3, in_shape=(1, 8, 8)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("name", ["resnet-smal", "resnet-preact-0x8", "resnet-preact-3x0", "resnet-preact-3", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown model") as caught:
        check_model_name(name)
    assert name != "resnet-smal" or caught.value.suggestions[0] == "resnet-small"


def test_names_are_checked_without_torchvision(run_python: Callable[..., str]) -> None:
    run_python(
        "import sys\n"
        "from ondevice_trgl.model.zoo import build_model, check_model_name\n"
        "check_model_name('resnet50')\n"
        "build_model('resnet-small', num_classes=3, in_shape=(1, 8, 8))\n"
        "assert not {'torchvision', 'torch._dynamo'} & set(sys.modules)\n"
    )


def test_only_torchvisions_networks_insist_on_three_channels() -> None:
    assert needs_channels("resnet50") == 3
    assert needs_channels("resnet-small") is None
    assert needs_channels("pkg:build") is None
    assert {"resnet-small", "resnet50", "swin_t"} <= set(model_names())


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "from ondevice_trgl.errors import DataError\n"
        "def both(num_classes, in_shape): return nn.Linear(in_shape[0], num_classes)\n"
        "def neither(): return nn.Linear(2, 2)\n"
        "def number(): return 5\n"
        "def broken(): raise RuntimeError('no such layer')\n"
        "def ours(): raise DataError('as it is')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    return "my_nets"


def test_a_users_callable_is_given_what_it_asks_for(own_module: str) -> None:
    both = build_model(f"{own_module}:both", num_classes=3, in_shape=(7,))
    assert isinstance(both, nn.Linear)
    assert (both.in_features, both.out_features) == (7, 3)
    assert isinstance(build_model(f"{own_module}:neither", num_classes=3, in_shape=(7,)), nn.Linear)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("absent", "cannot be imported"),
        ("number", "returned int, expected an nn.Module"),
        ("broken", "raised RuntimeError: no such layer"),
    ],
)
def test_a_users_callable_that_fails_is_a_usage_error(own_module: str, attribute: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(f"{own_module}:{attribute}", num_classes=3, in_shape=(7,))


def test_a_users_module_that_is_not_there_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="cannot be imported"):
        build_model("no_such_package_here:build", num_classes=3, in_shape=(7,))


def test_errors_of_this_package_pass_through(own_module: str) -> None:
    with pytest.raises(DataError, match="as it is"):
        build_model(f"{own_module}:ours", num_classes=3, in_shape=(7,))


def test_modules_of_several_blocks_have_a_name_of_their_own() -> None:
    model = build_model("resnet-preact-3x2x4", num_classes=3, in_shape=(1, 8, 8))
    assert [len([*group.children()]) for group in model.get_submodule("blocks").children()] == [2, 2, 2]
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    for name in ("resnet-preact-3x0x4", "resnet-frozen-3", "resnet-preact-1x2x3x4"):
        with pytest.raises(UnknownNameError):
            check_model_name(name)


def test_the_frozen_encoder_comes_to_a_quarter_of_the_side_and_is_not_trained() -> None:
    model = build_model("resnet-frozen-2x1x16", num_classes=3, in_shape=(1, 28, 28))
    stem = model.get_submodule("stem")
    assert stem(torch.randn(2, 1, 28, 28)).shape == (2, 16, 7, 7)
    assert not any(parameter.requires_grad for parameter in stem.parameters())
    assert all(parameter.requires_grad for parameter in model.get_submodule("blocks").parameters())


def test_orthogonal_weights_have_the_gain_and_spare_what_is_frozen() -> None:
    shape = Preprocessing(tuple("abc"), (1, 28, 28))
    plain, drawn = (
        build_for(Workload(model="resnet-frozen-2x1x16", init_gain=gain), shape, 0) for gain in (None, 0.05)
    )
    kernel = drawn.get_submodule("blocks.0.conv1").get_parameter("weight").flatten(1)
    torch.testing.assert_close(kernel @ kernel.t(), 0.05**2 * torch.eye(16), rtol=1e-4, atol=1e-6)
    stems = [model.get_submodule("stem").state_dict() for model in (plain, drawn)]
    assert all(torch.equal(stems[0][name], stems[1][name]) for name in stems[0])
    with pytest.raises(ConfigError, match="init_gain = 0"):
        Workload(init_gain=0)


@pytest.mark.parametrize("body", ["def f(:", "raise ValueError('no')", "raise SystemExit(3)"])
def test_whatever_importing_a_users_model_does_is_told(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "breaks_on_import.py").write_text(body, encoding="utf-8")
    before = list(sys.path)
    with pytest.raises(UsageError, match="'breaks_on_import:f' cannot be imported"):
        build_model("breaks_on_import:f", num_classes=3, in_shape=(1, 8, 8))
    assert sys.path == before
