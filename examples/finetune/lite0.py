"""EfficientNet-Lite0 (Tan and Le, 2019; the variant without squeeze and excitation), by the names of its weights."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

# kernel, stride of the first block, expansion, channels, blocks
_STAGES = (
    *((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3)),
    *((5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1)),
)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _padded(x: Tensor, kernel: int, stride: int) -> Tensor:
    """`x` as the weights were trained: where a stride leaves one row more to one side, that is the lower one."""
    whole = kernel - stride
    return F.pad(x, (whole // 2, whole - whole // 2) * 2)


class Block(nn.Module):
    """An inverted residual."""

    def __init__(self, entering: int, leaving: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inside = entering * expansion
        self._kernel, self._stride = kernel, stride
        self._adds = stride == 1 and entering == leaving
        if expansion > 1:
            self._expand_conv = nn.Conv2d(entering, inside, 1, bias=False)
            self._bn0 = _norm(inside)
        self._expands = expansion > 1
        self._depthwise_conv = nn.Conv2d(inside, inside, kernel, stride, groups=inside, bias=False)
        self._bn1 = _norm(inside)
        self._project_conv = nn.Conv2d(inside, leaving, 1, bias=False)
        self._bn2 = _norm(leaving)

    def forward(self, x: Tensor) -> Tensor:
        """The projection, added to `x` where both are of one shape."""
        out = F.relu6(self._bn0(self._expand_conv(x))) if self._expands else x
        out = F.relu6(self._bn1(self._depthwise_conv(_padded(out, self._kernel, self._stride))))
        out = cast(Tensor, self._bn2(self._project_conv(out)))
        return x + out if self._adds else out


class Lite0(nn.Module):
    """Pictures, of even height and width, in colour or grey, to logits."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        blocks: list[Block] = []
        entering = 32
        for kernel, stride, expansion, channels, count in _STAGES:
            for index in range(count):
                blocks.append(Block(entering, channels, kernel, stride if index == 0 else 1, expansion))
                entering = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(entering, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._fc = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = x.expand(-1, 3, -1, -1)  # grey in all three
        x = F.relu6(self._bn0(self._conv_stem(_padded(x, 3, 2))))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return cast(Tensor, self._fc(x.mean(dim=(2, 3))))


def make(num_classes: int) -> nn.Module:
    """The network, for `--model examples.finetune.lite0:make`."""
    return Lite0(num_classes)
