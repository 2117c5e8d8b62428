"""A Workload made real: the datasets that it names, and the model that fits them."""

from pathlib import Path

import torch
from torch import nn

from ondevice_trgl.config import Workload
from ondevice_trgl.data.preprocessing import Preprocessing
from ondevice_trgl.data.registry import DataBundle, load_data
from ondevice_trgl.model.names import check_model_name, needs_channels
from ondevice_trgl.model.zoo import build_model


def load_bundle(
    workload: Workload, seed: int, scratch_dir: Path | None, known: Preprocessing | None = None
) -> DataBundle:
    """The datasets, in the shape that the model needs; large ones go to a file in `scratch_dir`. Raises TrglError.

    Pixels are normalised as `known` says, where that is given.
    """
    check_model_name(workload.model)
    return load_data(
        workload.data,
        root=None if workload.data_root is None else Path(workload.data_root),
        image_size=workload.image_size,
        orientation=workload.orientation,
        train_limit=workload.train_limit,
        channels=needs_channels(workload.model),
        seed=seed,
        scratch_dir=scratch_dir,
        known=known,
    )


def build_for(workload: Workload, data: DataBundle | Preprocessing, seed: int) -> nn.Module:
    """The model with fresh weights drawn from `seed`, all of them in memory. Raises TrglError."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(workload.model, num_classes=data.num_classes, in_shape=data.input_shape)


def load_workload(workload: Workload, seed: int, scratch_dir: Path | None) -> tuple[DataBundle, nn.Module]:
    """Datasets and model. Raises TrglError."""
    data = load_bundle(workload, seed, scratch_dir)
    return data, build_for(workload, data, seed)
