"""Every generator that a network may draw from, as it was, also out of a checkpoint."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from ondevice_trgl.device.randomness import Randomness, seed_all, with_numpys

CPU = torch.device("cpu")


with_numpys()


def drawn() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
    ]


@pytest.fixture(autouse=True)
def put_back() -> Any:
    before = Randomness.now(CPU)
    yield
    before.restore(CPU)


@pytest.mark.parametrize("through_tensors", [False, True])
@pytest.mark.parametrize("draws", [0, 1, 2])  # after an odd number, both keep a Gaussian for the next call
def test_what_is_drawn_next_is_drawn_again(through_tensors: bool, draws: int) -> None:
    seed_all(7)
    for _ in range(draws):
        drawn()
    kept = Randomness.now(CPU)
    first = drawn()
    assert drawn() != first
    (Randomness.of(kept.tensors()) if through_tensors else kept).restore(CPU)
    assert drawn() == first


def test_seeding_makes_all_of_them_the_same_again() -> None:
    seed_all(2**62 + 1)
    first = drawn()
    seed_all(2**62 + 2)
    assert not set(drawn()) & set(first)
    seed_all(2**62 + 1)
    assert drawn() == first


def test_an_older_checkpoint_holds_torchs_alone() -> None:
    seed_all(1)
    old = {"rng": torch.get_rng_state()}
    first = drawn()
    Randomness.of(old).restore(CPU)
    again = drawn()
    assert again[-1] == first[-1]
    assert again[:-1] != first[:-1]
    Randomness.of({}).restore(CPU)  # nor is anything changed by none


def test_of_a_gpu_its_own_generator_is_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"cuda:1": torch.tensor([1, 2], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[str(device)].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({str(device): state}))
    kept = Randomness.now(torch.device("cuda:1")).tensors()
    states["cuda:1"] = torch.tensor([9, 9], dtype=torch.uint8)
    Randomness.of(kept).restore(CPU)
    assert states["cuda:1"].tolist() == [9, 9]
    Randomness.of(kept).restore(torch.device("cuda:1"))
    assert states["cuda:1"].tolist() == [1, 2]
