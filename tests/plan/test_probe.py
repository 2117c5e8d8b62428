"""What kernels take beside the tensors: never less than nothing, never measured above the limit, nothing else moved."""

import dataclasses
from typing import Any

import pytest
import torch

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.meter import PeakMeter, meter_for
from ondevice_trgl.model.blueprint import from_blueprint, to_blueprint
from ondevice_trgl.model.store import state_of
from ondevice_trgl.model.trace import Chain, trace
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.plan import probe as probing
from ondevice_trgl.plan.estimate import Affine, Costs, estimate
from ondevice_trgl.plan.probe import probe

SHAPE = (1, 8, 8)
CONFIG = TrainConfig(budget="64GB")
EVERYTHING = 2**60


def chain(name: str = "resnet-preact-3x4") -> Chain:
    """With weights that were never written, as the probe is given it."""
    return from_blueprint(to_blueprint(trace(build_model(name, num_classes=3, in_shape=SHAPE), torch.zeros(2, *SHAPE))))


def costs_of(network: Chain) -> Costs:
    return estimate(network, CONFIG, throw_away=False)


@pytest.fixture
def meter() -> PeakMeter:
    return meter_for("cpu")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(segment, batch) of every step; segment k is measured as 100 k + (10 + k) batch."""
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(probing._Trainee, "step", lambda self, batch: steps.append((self.index, batch)))

    def scratch(self: Any, costs: Costs, batch: int, meter: PeakMeter) -> int:
        self.step(batch)
        return int(100 * self.index + (10 + self.index) * batch)

    monkeypatch.setattr(probing._Trainee, "scratch", scratch)
    return steps


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw", "tau": "off", "head": "mlp"}])
def test_scratch_is_never_negative_and_nothing_else_changes(meter: PeakMeter, changes: dict[str, Any]) -> None:
    network, config = chain("resnet-small"), dataclasses.replace(CONFIG, **changes)
    costs = estimate(network, config, throw_away=False)
    probed = probe(chain("resnet-small"), costs, config, 16, meter, most_bytes=EVERYTHING)
    assert len(probed.scratch) == len(network.segments)
    assert all(s.constant >= 0 and s.slope >= 0 and 0 < s(16) < 2**30 for s in probed.scratch)
    assert dataclasses.replace(probed, scratch=()) == costs
    whole = (0, len(network.segments))
    assert probed.module_bytes(*whole, 16, accumulate=False) == costs.module_bytes(*whole, 16, accumulate=False)


@pytest.mark.usefixtures("ran")
def test_two_batches_give_what_is_constant_and_what_grows(meter: PeakMeter) -> None:
    probed = probe(chain(), costs_of(chain()), CONFIG, 32, meter, most_bytes=EVERYTHING)
    assert probed.scratch == tuple(Affine(100.0 * k, 10.0 + k) for k in range(len(chain().segments)))
    assert probed.scratch_bytes(0, 2, 8) == 100 + 11 * 8


@pytest.mark.usefixtures("ran")
@pytest.mark.parametrize("batch", [2, 4])
def test_a_batch_that_is_small_already_is_all_that_is_known(meter: PeakMeter, batch: int) -> None:
    probed = probe(chain(), costs_of(chain()), CONFIG, batch, meter, most_bytes=EVERYTHING)
    assert probed.scratch[1] == Affine(100.0 + 11 * batch, 0.0)


@pytest.mark.parametrize(("small", "large", "expected"), [(-50, -9, 0), (-50, 60, 60), (80, 20, 20), (0, 0, 0)])
def test_noise_below_nothing_is_nothing(
    monkeypatch: pytest.MonkeyPatch, meter: PeakMeter, small: int, large: int, expected: int
) -> None:
    monkeypatch.setattr(probing._Trainee, "step", lambda self, batch: None)
    monkeypatch.setattr(
        probing._Trainee, "scratch", lambda self, costs, batch, meter: small if batch == probing.SMALL else large
    )
    for scratch in probe(chain(), costs_of(chain()), CONFIG, 32, meter, most_bytes=EVERYTHING).scratch:
        assert min(scratch.constant, scratch.slope) >= 0
        assert scratch(32) >= expected


def test_what_is_above_the_limit_is_not_run_and_taken_for_the_worst_of_the_others(
    ran: list[tuple[int, int]], meter: PeakMeter
) -> None:
    network = chain("resnet-small")
    costs = costs_of(network)
    sizes = [costs.module_bytes(k, k + 1, 32, accumulate=False) for k in range(len(network.segments))]
    limit = sorted(sizes)[len(sizes) // 2]
    probed = probe(network, costs, CONFIG, 32, meter, most_bytes=limit)
    fits = [k for k, size in enumerate(sizes) if size <= limit]
    assert 0 < len(fits) < len(sizes)
    assert sorted({k for k, _ in ran}) == fits
    assert max(batch for _, batch in ran) == 32
    worst = Affine(100.0 * max(fits), 10.0 + max(fits))
    assert [s for k, s in enumerate(probed.scratch) if k not in fits] == [worst] * (len(sizes) - len(fits))
    assert [probed.scratch[k] for k in fits] == [Affine(100.0 * k, 10.0 + k) for k in fits]


def test_where_none_may_run_nothing_is_claimed(ran: list[tuple[int, int]], meter: PeakMeter) -> None:
    costs = costs_of(chain())
    probed = probe(chain(), costs, CONFIG, 32, meter, most_bytes=0)
    assert probed == costs
    assert probed.scratch_bytes(0, 1, 32) is None  # not zero: the planner allows for what it does not know
    assert ran == []


def test_the_tensors_are_evicted_and_no_gradient_stays(meter: PeakMeter) -> None:
    network = chain()
    probe(network, costs_of(network), CONFIG, 8, meter, most_bytes=EVERYTHING)
    tensors = state_of(network.model).values()
    assert tensors
    assert all(tensor.numel() == 0 and tensor.grad is None for tensor in tensors)


def test_the_same_segments_are_measured_the_same_in_spite_of_noise(meter: PeakMeter) -> None:
    """Three segments alike in all but their place: were noise to tell them apart, the same seed would give other cuts.

    Only what is small is promised: a figure that is near a step's edge may fall on either side of it.
    """
    found = {probe(chain(), costs_of(chain()), CONFIG, 8, meter, most_bytes=EVERYTHING).scratch for _ in range(3)}
    assert len(found) == 1


@pytest.mark.parametrize(
    ("measured", "steps"), [(-(10**9), 1), (0, 1), (1, 1), (2 << 20, 1), ((2 << 20) + 1, 2), (64 << 20, 32)]
)
def test_measurements_are_rounded_up(measured: int, steps: int) -> None:
    assert probing.rounded(measured) == steps * probing.STEP_BYTES


def test_real_steps_see_memory_that_a_kernel_takes_and_gives_back(
    monkeypatch: pytest.MonkeyPatch, meter: PeakMeter
) -> None:
    """64 MB inside every forward pass of the stem, gone before it returns."""
    if meter.name != "VmHWM":
        pytest.skip("needs a meter that sees short peaks")
    network, costs = chain(), costs_of(chain())
    stem = network.model.get_submodule("stem.0")
    kept = type(stem).forward

    def hungry(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.in_channels == 1:
            torch.ones(16 << 20)
        return kept(self, x)  # type: ignore[no-any-return]

    monkeypatch.setattr(type(stem), "forward", hungry)
    found = probe(network, costs, CONFIG, 8, meter, most_bytes=EVERYTHING).scratch
    assert 50e6 < found[0](8) < 80e6
    assert max(scratch(8) for scratch in found[1:]) < 30e6
