"""Weights out of a file: the model's own to the last bit, every misfit named, nothing run, little memory."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ondevice_trgl.errors import ConfigError, UsageError
from ondevice_trgl.model import weights
from ondevice_trgl.model.trace import trace
from ondevice_trgl.model.tuning import check_is_classifier
from ondevice_trgl.model.weights import read_weights
from ondevice_trgl.model.zoo import build_model

State = dict[str, Tensor]
WRITERS: dict[str, Callable[[State, Path], None]] = {"safetensors": save_file, "torch": torch.save}


def model(seed: int = 0, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("resnet-small", num_classes=classes, in_shape=(1, 8, 8))


def state(seed: int = 1, classes: int = 3) -> State:
    return dict(model(seed, classes).state_dict())


def same(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[State], Path]:
    def written(tensors: State) -> Path:
        path = tmp_path / "weights"
        WRITERS[request.param](tensors, path)
        return path

    return written


Write = Callable[[State], Path]


@pytest.mark.parametrize("piece", [64, weights.PIECE_BYTES])
def test_the_model_is_filled_in_place(write: Write, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(weights, "PIECE_BYTES", piece)
    network, wanted, calls = model(), state(), []
    before = {name: tensor.data_ptr() for name, tensor in network.state_dict().items()}
    read_weights(write(wanted), network, written=lambda: calls.append(1))
    assert same(dict(network.state_dict()), wanted)
    assert {name: tensor.data_ptr() for name, tensor in network.state_dict().items()} == before
    assert len(calls) >= len(wanted)
    assert all(parameter.requires_grad and parameter.grad_fn is None for parameter in network.parameters())


def test_the_digest_is_that_of_the_values_whatever_the_format(tmp_path: Path) -> None:
    digests = {}
    for seed in (1, 2):
        for format, writer in WRITERS.items():
            writer(state(seed), path := tmp_path / f"{seed}.{format}")
            digests[seed, format] = read_weights(path, model())
    assert digests[1, "torch"] == digests[1, "safetensors"] != digests[2, "torch"] == digests[2, "safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_is_cast_to_what_the_model_has(write: Write, dtype: torch.dtype) -> None:
    kept = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state().items()}
    network = model()
    read_weights(write(kept), network)
    assert same(dict(network.state_dict()), {n: t.float() if t.is_floating_point() else t for n, t in kept.items()})


def test_gaps_between_elements_do_no_harm(write: Write, tmp_path: Path) -> None:
    network = model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    wanted = state()
    read_weights(write(wanted), network)
    assert same(dict(network.state_dict()), wanted)
    spread = {name: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for name, t in wanted.items()}
    torch.save(spread, tmp_path / "spread")
    plain = model()
    read_weights(tmp_path / "spread", plain)
    assert same(dict(plain.state_dict()), wanted)


def test_everything_that_does_not_fit_is_named(write: Write) -> None:
    given = state(classes=5)
    names = [name for name in given if not name.startswith("classifier")]
    del given[names[0]]
    given[names[2]] = given[names[2]].to(torch.int32)
    given["extra"] = torch.zeros(4, 2)
    network = model()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        read_weights(write(given), network)
    assert sorted(caught.value.faults) == sorted(
        [
            f"missing in the file: {names[0]} {tuple(before[names[0]].shape)} float32",
            f"{names[2]} is {tuple(given[names[2]].shape)} int32 in the file, {tuple(before[names[2]].shape)} float32 "
            "in the model",
            "classifier.weight is (5, 64) float32 in the file, (3, 64) float32 in the model",
            "classifier.bias is (5,) float32 in the file, (3,) float32 in the model",
            "unknown to the model: extra (4, 2) float32",
        ]
    )
    assert same(dict(network.state_dict()), before)


def test_the_hint_for_a_classifier_of_other_classes_works(write: Write) -> None:
    path, network = write(state(classes=5)), model()
    with pytest.raises(ConfigError) as caught:
        read_weights(path, network)
    flag, names = caught.value.hint.split()[:2]
    assert (flag, set(names.split(","))) == ("--weights-skip", {"classifier.weight", "classifier.bias"})
    fresh, given = state(0), state(classes=5)
    for skip in (names.split(","), ["classifier"]):
        network = model()
        read_weights(path, network, skip=skip)
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, (fresh if name.startswith("classifier") else given)[name])


def test_what_only_the_file_has_can_be_skipped_and_a_name_that_nobody_has_is_a_fault(write: Write) -> None:
    path = write(state() | {"old.head.weight": torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"unknown to the model: old\.head\.weight \(2,\)"):
        read_weights(path, model())
    read_weights(path, model(), skip=["old"])
    with pytest.raises(ConfigError, match="clasifier, which is to be skipped, is no tensor or layer"):
        read_weights(path, model(), skip=["old", "clasifier"])


def test_a_file_of_another_model_has_all_its_names_listed(write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        read_weights(write({f"x.{i}": torch.zeros(1) for i in range(50)}), model())
    missing = len([name for name in state() if not name.endswith("num_batches_tracked")])
    assert len(caught.value.faults) == 50 + missing
    assert "another model" in caught.value.hint


def test_counters_of_batchnorm_may_be_missing(write: Write) -> None:
    wanted = {name: tensor for name, tensor in state().items() if not name.endswith("num_batches_tracked")}
    network = model()
    assert len(wanted) < len(network.state_dict())
    read_weights(write(wanted), network)
    assert same({name: network.state_dict()[name] for name in wanted}, wanted)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("left_out", ["first.weight", "second.weight", None])
def test_tied_weights_need_one_of_their_names(tmp_path: Path, left_out: str | None) -> None:
    wanted = {name: tensor for name, tensor in Tied().state_dict().items() if name != left_out}
    torch.save(wanted, tmp_path / "w")
    network = Tied()
    read_weights(tmp_path / "w", network)
    assert network.first.weight is network.second.weight
    assert torch.equal(network.first.weight, wanted["first.weight" if left_out != "first.weight" else "second.weight"])


class Harm:
    def __reduce__(self) -> Any:
        return Path.write_text, (Path("harm.txt"), "done")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Harm(), "hold more than tensors"),
        ({"weight": torch.zeros(2), "more": Harm()}, "hold more than tensors"),
        ({"state_dict": {"weight": torch.zeros(2)}, "epoch": 3}, r"no state dict: it holds state_dict \(dict\), epoch"),
        ([torch.zeros(2)], "no state dict: the file holds a list"),
        ({"weight": torch.zeros(2).to_sparse()}, "no state dict: it holds weight"),
    ],
)
def test_a_torch_file_that_is_no_state_dict_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "w.pt")
    with pytest.raises(UsageError, match=words) as caught:
        read_weights(Path("w.pt"), model())
    assert "torch.save(model.state_dict(), FILE)" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]
    assert len(caught.value.message) < 400


def test_an_old_torch_file_or_a_pickle_is_refused(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "w", _use_new_zipfile_serialization=False)
    with pytest.raises(UsageError, match=r"of before 1\.6"):
        read_weights(tmp_path / "w", model())


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 and no more", b"\x08" + bytes(7) + b'{"a": 1}'])
def test_what_is_no_file_of_weights_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(UsageError, match=r"weights .* (are neither|cannot be read)"):
        read_weights(tmp_path / "w", model())


@pytest.mark.parametrize("name", ["absent", "."])
def test_a_path_without_a_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be read: "):
        read_weights(tmp_path / name, model())


PEAK = """
import sys, torch
from pathlib import Path
from ondevice_trgl.device.allocator import tune
from ondevice_trgl.device.meter import meter_for
from ondevice_trgl.model.filed import weights_in_file
from ondevice_trgl.model.trace import trace
from ondevice_trgl.model.tuning import check_is_classifier
from ondevice_trgl.model.weights import read_weights
tune("glibc")
with weights_in_file(Path(sys.argv[2])) as filed:
    model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048) for _ in range(8)))
    filed.take(model)
with meter_for("cpu") as meter:
    meter.reset()
    before = meter.peak_bytes()
    read_weights(Path(sys.argv[1]), model, written=filed.release)
    print(meter.peak_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are dropped on Linux alone")
@pytest.mark.parametrize("format", WRITERS)
def test_the_weights_are_never_in_memory_together(tmp_path: Path, format: str) -> None:
    tensors = {f"{i}.{name}": torch.ones(2048, 2048)[: 2048 if name == "weight" else 1].squeeze().clone()
               for i in range(8) for name in ("weight", "bias")}  # fmt: skip
    WRITERS[format](tensors, tmp_path / "w")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "w"), str(tmp_path)],
        cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 40_000_000  # of 134


def test_a_classifier_of_other_classes_is_left_as_it_is_and_told(write: Write) -> None:
    path, network, fresh, given = write(state(classes=5)), model(), state(0), state(classes=5)
    filled = read_weights(path, network, classes=3)
    assert filled.left == "classifier"
    assert filled.why == f"classifier is for 5 classes in {path.name} and for 3 here: left as it is initialised"
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, (fresh if name.startswith("classifier") else given)[name])
    assert filled.digest == read_weights(path, model(), skip=["classifier"]).digest
    assert not read_weights(path, model(classes=5), classes=5).left


@pytest.mark.parametrize("change", ["missing", "foreign", "width", "two"])
def test_where_more_is_amiss_nothing_is_left(write: Write, change: str) -> None:
    given = state(classes=5)
    if change == "missing":
        del given["classifier.bias"]
    elif change == "foreign":
        given["extra"] = torch.zeros(1)
    elif change == "width":
        given["classifier.weight"] = torch.zeros(5, 65)
    else:
        given["classifier.bias"] = torch.zeros(4)
    with pytest.raises(ConfigError, match=r"classifier\.weight is "):
        read_weights(write(given), model(), classes=3)


def test_a_layer_that_is_left_has_to_be_the_classifier() -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))
    for apart in (True, False):
        chain = trace(network, torch.zeros(2, 4), apart=apart)
        check_is_classifier(chain, "4", "it is left")
        with pytest.raises(ConfigError, match="it is left, and it is not the classifier") as caught:
            check_is_classifier(chain, "0", "it is left")
        assert "--weights-skip 0" in caught.value.hint
