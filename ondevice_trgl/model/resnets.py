"""Residual networks for small images, which torchvision does not have."""

from torch import Tensor, nn


class BasicBlock(nn.Module):
    """relu(shortcut + bn(conv(relu(bn(conv(x)))))); the shortcut is the identity, or a 1x1 projection."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and in_channels == channels
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)  # type: ignore[no-any-return]


class PreactBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))): the pre-activation block of He et al. 2016."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Stem, stages of blocks (each but the first halves the side), average pool, linear.

    With `group`, as many blocks each are in a Sequential of their own: `blocks.0` is what one local module takes.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[PreactBlock],
        stages: tuple[tuple[int, int], ...],
        in_channels: int,
        num_classes: int,
        *,
        group: int = 1,
    ) -> None:
        super().__init__()
        width = stages[0][1]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        blocks: list[nn.Module] = []
        for index, (depth, channels) in enumerate(stages):
            for position in range(depth):
                blocks.append(block(width, channels, 2 if index and not position else 1))
                width = channels
        if group > 1:
            blocks = [nn.Sequential(*blocks[start : start + group]) for start in range(0, len(blocks), group)]
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.blocks(self.stem(x))).flatten(1))  # type: ignore[no-any-return]


def frozen_stem(network: ResNet, in_channels: int) -> ResNet:
    """`network` with a random encoder to a quarter of the side in place of its stem, which is not trained.

    The setting in which greedy training stagnates on few samples (arXiv 2309.17357, section 5.4): features that are
    good for nothing in particular, and modules that can only change them.
    """
    first = network.stem[0]
    assert isinstance(first, nn.Conv2d)
    width = first.out_channels
    layers = [
        nn.Conv2d(in_channels, width, 3, 1, 1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3, 1, 1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    ]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    network.stem = nn.Sequential(*layers).requires_grad_(False)
    return network


def orthogonal(network: nn.Module, gain: float) -> None:
    """Draw every kernel and matrix that is trained anew: orthogonal, times `gain` (arXiv 2309.17357, appendix)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.requires_grad:
            nn.init.orthogonal_(module.weight, gain)
