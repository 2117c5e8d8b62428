"""What the report says of a network is true of what is exported: one invariant over all that are accepted."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ondevice_trgl import TrainConfig
from tests.asked_here import Trainer
from tests.model.test_own_networks import EQUAL, logits
from tests.model.test_own_networks_more import MORE

pytestmark = pytest.mark.usefixtures("code_pages_kept")


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """A bright row: its number is the class."""
    labels = torch.arange(count) % 10
    images = 0.5 * torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    images[torch.arange(count), :, labels] += 2.0
    return images, labels


ALL = EQUAL | MORE
OTHERS = ("AlwaysDrops", "hooked_gradient")
"""The accuracy of the one is a draw; the other's hook wants the gradient of an input that has none at a boundary."""


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", [name for name in ALL if name not in OTHERS])
def test_the_accuracy_of_the_exported_network_is_the_one_reported(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    random.seed(0)
    make, least = ALL[name]
    config = TrainConfig(
        budget="64GB", modules=min(2, least), epochs=3, classifier_epochs=3, batch_size=16, threads=1, lr=0.05
    )
    trainer = Trainer(make(), config, run_dir=tmp_path / "run")
    images, labels = samples(60, 2)
    report = trainer.fit(TensorDataset(*samples(64, 1)), TensorDataset(images, labels))
    assert report.accuracy is not None
    with torch.no_grad():
        exported = trainer.export(head="last").eval()
        guesses = logits(exported(images)).argmax(1)
    assert float((guesses == labels).float().mean()) == pytest.approx(report.accuracy.last_head_val, abs=1e-6)
    assert len(set(guesses.tolist())) > 1 or report.accuracy.last_head_val == pytest.approx(0.1)
