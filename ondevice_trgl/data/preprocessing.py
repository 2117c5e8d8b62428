"""How a sample becomes an input of the network, and what its outputs mean. Belongs to the trained model; no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ondevice_trgl.tasks import CLASSES, KINDS
from ondevice_trgl.typed import record_of

NONE, BILINEAR, CENTER_CROP = "none", "bilinear", "center-crop"


@dataclass(frozen=True)
class Preprocessing:
    """What the training data were to the network. Whoever uses the network afterwards has to do the same."""

    class_names: tuple[str, ...]
    """Of the network's outputs, in their order: classes, labels, or what the numbers are."""
    input_shape: tuple[int, ...]
    """Of one input, C x H x W for pictures."""
    resize: str = NONE
    """none; bilinear: stored pixels scaled to H x W, without antialiasing; center-crop: of a picture file the largest
    part in the middle that has the shape of the input, scaled to it (bilinear, antialiased)"""
    orientation: str = "exif"
    """Of picture files: exif, upright as their EXIF orientation says; stored, as their pixels lie"""
    mean: tuple[float, ...] | None = None
    """Of each channel, of pixels from 0 to 255: an input is (pixels - mean) / std. None: inputs come as the dataset
    gives them, bytes as 0 to 1."""
    std: tuple[float, ...] | None = None
    task: str = CLASSES
    """What the outputs are: classes (logits of one of them), regression (numbers), multi-label (a logit of each)"""

    @staticmethod
    def kind_in(values: Mapping[str, Any]) -> str:
        """The task in what `to_dict` gave; classes of a run from before there were others."""
        return str(values.get("task", CLASSES))

    @property
    def num_classes(self) -> int:
        """Width of the network's output."""
        return len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values; `pixels` says what mean and std are to be applied to."""
        values: dict[str, Any] = {
            "task": self.task,
            "class_names": list(self.class_names),
            "input_shape": list(self.input_shape),
            "resize": self.resize,
            "orientation": self.orientation,
            "pixels": None if self.mean is None else [0, 255],
            "mean": None if self.mean is None else list(self.mean),
            "std": None if self.std is None else list(self.std),
        }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_dict`. Raises ValueError for what is none."""
        known = record_of(cls, values, lenient=True)
        if not known.class_names or min(known.input_shape, default=1) < 1:
            raise ValueError("the preprocessing is of no class, or of inputs without a number")
        if known.task not in KINDS:
            raise ValueError(f"the task is {known.task[:60]!r}, expected {' | '.join(KINDS)}")
        if (known.mean is None) != (known.std is None) or len(known.mean or ()) != len(known.std or ()):
            raise ValueError("mean and std are not of the same channels")
        return known

    @property
    def metadata(self) -> dict[str, str]:
        """For the header of a safetensors file, whose values are strings."""
        return {"preprocessing": json.dumps(self.to_dict(), separators=(",", ":"))}
