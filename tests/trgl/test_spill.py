"""Gradients and optimizer state on disk: the same update as in memory, and next to nothing held."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ondevice_trgl.errors import NonFiniteError, StorageError
from ondevice_trgl.plan.live_bytes import LiveBytes
from ondevice_trgl.trgl import spill as spilling
from ondevice_trgl.trgl.optim import Optimizer

KINDS = [("sgd", 0.9), ("sgd", 0.0), ("adamw", 0.9)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters of a kilobyte are large, and take several chunks."""
    monkeypatch.setattr(spilling, "SMALLEST_BYTES", 1024)
    monkeypatch.setattr(spilling, "CHUNK_ELEMENTS", 100)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16 * 36, 5))
    kernel = next(net.parameters())
    kernel.data = kernel.data.to(memory_format=torch.channels_last)
    return net


def batch(seed: int) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def trained(
    folder: Path | None, kind: str, momentum: float, steps: range, state: Any = None, clip: float | None = None
) -> Any:
    net = network()
    optimizer = Optimizer(kind, dict(net.named_parameters()), momentum=momentum, weight_decay=0.01, clip_norm=clip)
    if folder is not None:
        optimizer.spill(folder)
    for step in steps:
        for part in range(2):  # two micro-batches
            net(batch(2 * step + part)).square().mean().backward()
        optimizer.step(0.05)
    return net, optimizer


@pytest.mark.parametrize("clip", [1e-3, 0.3, 1e6])
@pytest.mark.parametrize(("kind", "momentum"), KINDS)
def test_gradients_in_the_file_are_clipped_with_those_in_memory_as_torch_does(
    tmp_path: Path, kind: str, momentum: float, clip: float
) -> None:
    (one, _), (two, b) = (trained(folder, kind, momentum, range(1), clip=clip) for folder in (None, tmp_path))
    three = network()
    optimizer = Optimizer(kind, dict(three.named_parameters()), momentum=momentum, weight_decay=0.01)
    for part in range(2):
        three(batch(part)).square().mean().backward()
    norm = nn.utils.clip_grad_norm_(three.parameters(), clip)
    optimizer.step(0.05)
    assert (float(norm) > clip) == (clip < 1e6)
    for name, parameter in three.named_parameters():
        torch.testing.assert_close(one.get_parameter(name), parameter, rtol=1e-5, atol=1e-7)
        assert torch.equal(two.get_parameter(name), one.get_parameter(name))
    b.close()


def test_an_update_that_goes_on_after_a_failure_clips_once(monkeypatch: pytest.MonkeyPatch) -> None:
    nets, change, failing = (network(), network()), Optimizer._change, ["3.weight"]

    def fails_once(self: Optimizer, name: str, *rest: Any) -> None:
        if name in failing:
            failing.remove(name)
            raise MemoryError
        change(self, name, *rest)

    for net in nets:
        optimizer = Optimizer("sgd", dict(net.named_parameters()), clip_norm=1e-2)
        net(batch(0)).square().mean().backward()
        if net is nets[1]:
            monkeypatch.setattr(Optimizer, "_change", fails_once)
            with pytest.raises(MemoryError):
                optimizer.step(0.1)
        optimizer.step(0.1)
    assert not failing
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets), strict=True))


@pytest.mark.parametrize("spilled", [False, True])
def test_gradients_without_a_finite_norm_change_nothing_and_are_dropped(tmp_path: Path, spilled: bool) -> None:
    net = network()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer = Optimizer("sgd", dict(net.named_parameters()), clip_norm=1.0)
    if spilled:
        optimizer.spill(tmp_path)
    (net(batch(0)).sum() * 3e38).backward()
    with pytest.raises(NonFiniteError, match=r"the norm of the gradients is (inf|nan)"):
        optimizer.step(0.1)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())
    optimizer.step(0.1)  # nothing is left of them
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    optimizer.close()


def test_clipping_reads_gradients_chunk_by_chunk(tmp_path: Path) -> None:
    layer = nn.Linear(200, 200, bias=False)
    optimizer = Optimizer("sgd", dict(layer.named_parameters()), momentum=0.0, clip_norm=1e-3)
    optimizer.spill(tmp_path)
    layer(torch.randn(4, 200)).square().mean().backward()
    gc.collect()
    with LiveBytes() as live:
        optimizer.step(0.1)
    assert live.peak <= 4 * 100 * 4 + 64
    optimizer.close()


@pytest.mark.parametrize(("kind", "momentum"), KINDS)
def test_it_trains_as_in_memory(tmp_path: Path, kind: str, momentum: float) -> None:
    (one, a), (two, b) = (trained(folder, kind, momentum, range(4)) for folder in (None, tmp_path))
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(two.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)
    assert a.state.keys() == b.state.keys()
    for name, tensor in a.state.items():
        torch.testing.assert_close(b.state[name], tensor, rtol=1e-5, atol=1e-6)
    assert not any(p.grad is not None for p in two.parameters())
    b.close()


@pytest.mark.parametrize(("kind", "momentum"), KINDS)
def test_state_goes_in_and_comes_out(tmp_path: Path, kind: str, momentum: float) -> None:
    net, optimizer = trained(None, kind, momentum, range(2))
    before = {name: tensor.clone() for name, tensor in optimizer.state.items()}
    optimizer.spill(tmp_path)  # in the middle of a training
    optimizer.spill(tmp_path)
    assert {name: tensor.shape for name, tensor in optimizer.state.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.state.items())
    again = Optimizer(kind, dict(net.named_parameters()), momentum=momentum, weight_decay=0.01)
    again.load({name: tensor.clone() for name, tensor in optimizer.state.items()})
    optimizer.close()
    assert again.state.keys() == before.keys()


def test_dropped_gradients_are_not_used(tmp_path: Path) -> None:
    net, optimizer = trained(tmp_path, "sgd", 0.9, range(1))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net(batch(9)).square().mean().backward()
    optimizer.drop_gradients()
    optimizer.step(0.05)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    optimizer.close()


def test_one_gradient_and_some_chunks_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spilling, "CHUNK_ELEMENTS", 1000)
    net = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(6)))
    optimizer = Optimizer("adamw", dict(net.named_parameters()))
    optimizer.spill(tmp_path)
    optimizer.allocate()
    x = torch.ones(1, 100)
    with LiveBytes() as live:
        net(x).sum().backward()
        optimizer.step(0.1)
    assert max(live.timeline) < 3 * 40_000  # a gradient is 40 000 bytes, all six of them 240 000
    optimizer.close()


def test_what_is_closed_or_forgotten_leaves_no_hook(tmp_path: Path) -> None:
    for close in (True, False):
        net, optimizer = trained(tmp_path, "sgd", 0.9, range(1))
        if close:
            optimizer.close()
        del optimizer
        gc.collect()
        net(batch(3)).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    optimizer = Optimizer("sgd", dict(network().named_parameters()))
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        optimizer.spill(tmp_path)
    assert "--cache-dir" in caught.value.hint
