"""A residual network and a dataset so small that a whole run takes a tenth of a second."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ondevice_trgl import Callback, Report, RunState, TrainConfig
from tests.asked_here import Trainer

CLASSES = 3


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class Net(nn.Module):
    """(B, 1, 6, 6) -> (B, 3)."""

    def __init__(self, *, dropout: float = 0.0, channels: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.blocks = nn.Sequential(
            *(nn.Sequential(Block(channels), nn.Dropout(dropout)) if dropout else Block(channels) for _ in range(3))
        )
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
        return out


def net(**kwargs: Any) -> Net:
    """The same weights every time, whatever the state of the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return Net(**kwargs)


def samples(count: int, seed: int = 0) -> TensorDataset:
    """A bright row, a bright column, or neither: that is the class."""
    labels = torch.arange(count) % CLASSES
    images = 0.3 * torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    images[labels == 0, 0, 2] += 2.0
    images[labels == 1, 0, :, 2] += 2.0
    return TensorDataset(images, labels)


def config(**changes: Any) -> TrainConfig:
    usual = {"budget": "64GB", "modules": ("blocks.0", "blocks.1"), "epochs": 2, "batch_size": 8, "threads": 1}
    return TrainConfig(**{**usual, "classifier_epochs": changes.get("epochs", 2), **changes})


class Fit:
    """Runs in one temporary folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name

    def __call__(
        self,
        name: str,
        *,
        model: nn.Module | None = None,
        callbacks: Sequence[Callback] = (),
        train: Any = None,
        val: Any = "default",
        test: Any = "default",
        resume: bool | str = False,
        force: bool = False,
        **changes: Any,
    ) -> Report:
        if isinstance(train, str):  # the setting of that name, not a set
            changes, train = {**changes, "train": train}, None
        trainer = Trainer(
            net() if model is None else model,
            config(**changes),
            run_dir=self.path(name),
            callbacks=callbacks,
            force=force,
        )
        return trainer.fit(
            samples(26) if train is None else train,
            samples(9, 1) if isinstance(val, str) else val,
            samples(9, 2) if isinstance(test, str) else test,
            resume=resume,
        )

    def weights(self, name: str) -> bytes:
        return (self.path(name) / "model.safetensors").read_bytes()


class At(Callback):
    """Does `what` at the `number`-th call (from 1) of `hook`."""

    def __init__(self, hook: str, number: int, what: Callable[[RunState], None]) -> None:
        self._left = number
        self._what = what
        setattr(self, hook, self._count)

    def _count(self, run: RunState) -> None:
        self._left -= 1
        if self._left == 0:
            self._what(run)


class CrashError(Exception):
    """What a test raises in the middle of a run."""


def crash(run: RunState) -> None:
    raise CrashError(f"{run.phase} of module {run.module}")


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    return Fit(tmp_path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """The model.safetensors of an uninterrupted run with the given settings, trained once a session."""
    done: dict[str, bytes] = {}

    def weights(*, dropout: float = 0.0, **settings: Any) -> bytes:
        key = repr((dropout, sorted(settings.items())))
        if key not in done:
            reference = Fit(tmp_path_factory.mktemp("whole"))
            reference("run", model=net(dropout=dropout), **settings)
            done[key] = reference.weights("run")
        return done[key]

    return weights
