"""What the network is adapted to: few pictures to train on, for `--data examples.finetune.data:fashion_mnist`."""

from torch import Tensor

from ondevice_trgl.data.images import ImageSet
from ondevice_trgl.data.registry import load_data


class First:
    """The first `count` samples of a dataset, or all where there are fewer."""

    def __init__(self, whole: ImageSet, count: int, classes: tuple[str, ...]) -> None:
        self._whole, self._count = whole, min(count, len(whole))
        self.classes = classes

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._whole[index]


def _few(name: str) -> tuple[First, First, First]:
    data = load_data(name, seed=0)
    counted = ((data.train, 1000), (data.val, 300), (data.test, 2000))
    train, val, test = (First(part, count, data.class_names) for part, count in counted)
    return train, val, test


def fashion_mnist() -> tuple[First, First, First]:
    """1 000 pictures of clothes to train on, 300 to choose a head by, 2 000 to test (Debian: dataset-fashion-mnist)."""
    return _few("fashion-mnist")


def digits() -> tuple[First, First, First]:
    """1 000 handwritten digits to train on, 200 to choose a head by, 300 to test; they come with the package."""
    return _few("digits")
