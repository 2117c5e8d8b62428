"""What comes out of this room, `DataBundle`, and what was asked of it, `Asked`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ondevice_trgl.data.images import ImageSet
from ondevice_trgl.data.preprocessing import Preprocessing
from ondevice_trgl.data.splits import balanced_head, carve, check_classes, class_name, strata
from ondevice_trgl.errors import DataError
from ondevice_trgl.tasks import AUTO, CLASSES, REGRESSION

_LEAST_VAL = 100
_UNEVEN = 3
"""From this many times as many samples in the largest class as in the smallest on, it is told."""


@dataclass(frozen=True)
class DataBundle:
    """A dataset ready for training."""

    name: str
    train: ImageSet
    val: ImageSet
    test: ImageSet
    preprocessing: Preprocessing
    description: str
    """One line: source, counts, resizing, expansion to more channels."""
    digest: str
    """Hash of content, order and transform: equal digests deliver equal samples under equal indices."""

    @property
    def num_classes(self) -> int:
        return self.preprocessing.num_classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """C x H x W as delivered by the three sets."""
        return self.preprocessing.input_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.preprocessing.class_names


@dataclass(frozen=True)
class Asked:
    """What the caller wants done to a dataset; see `load_data`."""

    name: str
    image_size: int | None = None
    train_limit: int | None = None
    channels: int | None = None
    seed: int = 0
    scratch_dir: Path | None = None
    task: str = AUTO
    """classes, regression or multi-label; auto: told from the data"""

    def delivered(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an input after resizing and repeating. Raises DataError where that cannot be done."""
        if self.image_size is None and self.channels is None:
            return shape
        if len(shape) != 3:
            raise DataError(
                f"{self.name} has inputs with {len(shape)} dimensions; image_size and channels need images, C x H x W",
                hint="leave image size and channels out",
            )
        have, height, width = shape
        if self.channels not in (None, have) and have != 1:
            raise DataError(
                f"{self.name} has {have} channels, {self.channels} were asked for; only a single channel can be"
                " repeated",
                hint=f"use a model that takes {have} channels",
            )
        size = (self.image_size, self.image_size) if self.image_size is not None else (height, width)
        return (self.channels or have, *size)

    def describe(
        self,
        given: tuple[int, ...],
        sizes: Sequence[int],
        names: Sequence[str],
        labels: Tensor,
        origin: str,
        task: str = CLASSES,
    ) -> str:
        """The one-line description of a bundle whose inputs come in the shape `given`; `sizes` of the three sets.

        `labels` are those to train on, of classes with those `names`; how uneven they are is told where it matters. Of
        targets they are what the numbers are called.
        """
        shape, size = self.delivered(given), "x".join(map(str, given))
        if shape[1:] != given[1:]:
            size += f" resized to {'x'.join(map(str, shape[1:]))} (bilinear)"
        if shape[:1] != given[:1]:
            size += f", the single channel repeated to {shape[0]}"
        counts = " / ".join(f"{n} {split}" for n, split in zip(sizes, ("train", "val", "test"), strict=True))
        limited = f" (limited to {self.train_limit})" if self.train_limit is not None else ""
        if labels.is_floating_point():
            what = "targets" if task == REGRESSION else "labels"
            return f"{origin}: {counts}{limited}; {task} of {len(names)} {what}; {size}"
        told = f"{origin}: {counts}{limited}; {len(names)} classes; {size}"
        of_class = torch.bincount(labels, minlength=len(names))
        least, most = int(of_class.min()), int(of_class.max())
        if most < _UNEVEN * least:
            return told
        smallest, largest = (class_name(int(at), names) for at in (of_class.argmin(), of_class.argmax()))
        return (
            f"{told}; {least} to {most} samples a class (smallest {smallest}, largest {largest};"
            " --balance draws all classes equally often)"
        )

    def limit(self, positions: Tensor, labels: Tensor, *, split: str) -> Tensor:
        """Those of `positions` that the train limit leaves: of val a fifth as many, but 100 at least; of test all.

        Raises DataError where it leaves some class without a sample to train on.
        """
        if self.train_limit is None or split == "test":
            return positions
        labels = strata(labels)
        classes = len(labels[positions].unique())
        if split == "train" and self.train_limit < classes:
            raise DataError(
                f"a train limit of {self.train_limit} leaves some of the {classes} classes of {self.name}, which has"
                f" {len(labels)} samples, without any",
                hint=f"raise the train limit to {classes} or more",
            )
        most = self.train_limit if split == "train" else max(self.train_limit // 5, _LEAST_VAL)
        return balanced_head(positions, labels, most)

    def split(self, labels: Tensor, carved: tuple[int | None, ...], names: Sequence[str]) -> dict[str, Tensor]:
        """Positions of train among the samples with those labels, and of val and test where `carved` says how many.

        `names` of the classes. Raises DataError where there are too few samples, of all or of some class, or all are of
        one class.
        """
        what = f"{self.name} (train)"
        check_classes(labels, what=what, names=names)
        sizes = {split: size for split, size in zip(("val", "test"), carved, strict=True) if size is not None}
        parts = carve(strata(labels), tuple(sizes.values()), self.seed, what=self.name, names=names)
        return {
            split: self.limit(part, labels, split=split) for split, part in zip(("train", *sizes), parts, strict=True)
        }
