"""A Workload made real: the datasets that it names, and the model that fits them."""

from pathlib import Path

import torch
from torch import nn

from ondevice_trgl.config import Workload
from ondevice_trgl.data.registry import DataBundle, load_data
from ondevice_trgl.model.zoo import build_model, check_model_name, needs_channels


def load_workload(workload: Workload, seed: int, scratch_dir: Path | None) -> tuple[DataBundle, nn.Module]:
    """Datasets and a model with fresh weights drawn from `seed`. Raises TrglError.

    Memory: the model's weights; large datasets go to a file in `scratch_dir`.
    """
    check_model_name(workload.model)
    data = load_data(
        workload.data,
        root=None if workload.data_root is None else Path(workload.data_root),
        image_size=workload.image_size,
        train_limit=workload.train_limit,
        channels=needs_channels(workload.model),
        seed=seed,
        scratch_dir=scratch_dir,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(workload.model, num_classes=data.num_classes, in_shape=data.input_shape)
    return data, model


def scratch_beside(path: Path) -> Path:
    """The nearest folder that exists at or above `path`: a place on the same disk."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
