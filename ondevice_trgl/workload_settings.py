"""What to train, a frozen record: the model and the data by name; `config` says how. Every fault is reported."""

import math
from dataclasses import dataclass
from pathlib import Path

from ondevice_trgl import checks
from ondevice_trgl.checks import Checked, setting
from ondevice_trgl.errors import ConfigError

IN_FILES = ("folder", "csv")
"""Kinds of data that are picture files, named by a path: `folder:PATH`."""
ORIENTATIONS = ("exif", "stored")


@dataclass(frozen=True, kw_only=True)
class Workload(Checked):
    """What to train: the model and the data by name."""

    model: str = setting("resnet-small", checks.text)
    """Zoo name, or `pkg.module:callable` that returns an `nn.Module`."""
    data: str = setting("digits", checks.text)
    """Dataset name, `folder:PATH`, `csv:FILE`, `synthetic:CxHxW:CLASSES|regT|multiT:N`, or `pkg.module:callable`."""
    image_size: int | None = setting(None, checks.int_from(1, optional=True, most=16384))
    """Side of the square that images are resized to; None keeps the dataset's own."""
    orientation: str = setting("exif", checks.one_of(*ORIENTATIONS))
    """Of picture files: exif turns them upright as the file says; stored leaves the pixels as they lie in it."""
    data_root: str | Path | None = setting(None, checks.path)
    """Where dataset files are looked for first."""
    train_limit: int | None = setting(None, checks.int_from(1, optional=True))
    """Use at most this many training samples."""
    init_gain: float | None = setting(None, checks.number(0.0, math.inf, open_below=True, words=(None,)))
    """Draw kernels and matrices that are trained as orthogonal ones, times this (the paper: 0.1, or 0.05 sequential);
    None leaves the model's own initialisation. `weights` come over it."""
    weights: str | Path | None = setting(None, checks.path)
    """File that the weights start from (safetensors, or a state dict of torch.save); None draws them from the seed."""
    weights_skip: tuple[str, ...] | None = setting(None, checks.names)
    """Tensors or layers that `weights` does not fill, by their names in the state dict."""

    def __post_init__(self) -> None:
        if isinstance(self.weights_skip, list):
            object.__setattr__(self, "weights_skip", tuple(self.weights_skip))
        super().__post_init__()
        faults, hints = [], []
        if self.weights_skip and self.weights is None:
            faults.append(f"weights_skip = {list(self.weights_skip)}: there are no weights to skip any of")
            hints.append("give weights")
        kind, colon, _ = self.data.partition(":")
        if self.orientation != "exif" and not (colon and kind in IN_FILES):
            faults.append(f"orientation = {self.orientation!r}: {self.data} has no picture files")
            hints.append(f"it is for {' and '.join(f'{kind}:PATH' for kind in IN_FILES)}")
        if faults:
            raise ConfigError(faults, hint="; ".join(hints))
