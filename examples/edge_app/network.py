"""The app's own network and data: nothing here knows about training by modules."""

from typing import cast

import torch
from torch import Tensor, nn

from ondevice_trgl.data.packaged import digits

TRAIN, VAL, TEST = range(0, 1300), range(1300, 1500), range(1500, 1797)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`x`, and what the branch adds to it."""
        return torch.relu(x + cast(Tensor, self.branch(x)))


class DigitNet(nn.Module):
    """Pictures of 1x8x8 to ten logits."""

    def __init__(self, channels: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(blocks)))
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        features = cast(Tensor, self.blocks(self.stem(x))).mean(dim=(2, 3))
        return cast(Tensor, self.classifier(features))


def make_network() -> nn.Module:
    """The network as it is before training, the same every time: a run is gone on with the one it began with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DigitNet()


def as_input(pixels: Tensor) -> Tensor:
    """What the network is fed of 64 values from 0 to 255."""
    return (pixels.reshape(1, 8, 8).float() - 78.0) / 96.0


class Digits:
    """Some of the 1 797 UCI digits, as a map-style dataset of (picture, label)."""

    classes = tuple("0123456789")

    def __init__(self, rows: range) -> None:
        part = digits().train
        self._pixels = torch.cat([chunk.clone() for chunk in part.stream()])[rows.start : rows.stop]
        self._labels = part.labels[rows.start : rows.stop]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return as_input(self._pixels[index]), int(self._labels[index])
