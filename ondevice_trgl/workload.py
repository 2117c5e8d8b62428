"""A Workload made real: the datasets that it names, and the model that fits them."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ondevice_trgl.config import Workload
from ondevice_trgl.data.preprocessing import Preprocessing
from ondevice_trgl.data.registry import DataBundle, load_data
from ondevice_trgl.model.names import check_model_name, needs_channels
from ondevice_trgl.model.resnets import orthogonal
from ondevice_trgl.model.weights import Filled, read_weights
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.tasks import AUTO


def load_bundle(
    workload: Workload, seed: int, scratch_dir: Path | None, known: Preprocessing | None = None, task: str = AUTO
) -> DataBundle:
    """The datasets, in the shape that the model needs; large ones go to a file in `scratch_dir`. Raises TrglError.

    Pixels are normalised as `known` says, where that is given; labels are read as `task` says.
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
        task=task,
    )


def build_for(workload: Workload, data: DataBundle | Preprocessing, seed: int) -> nn.Module:
    """The model with fresh weights drawn from `seed`, all of them in memory. Raises TrglError."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build_model(workload.model, num_classes=data.num_classes, in_shape=data.input_shape)
        if workload.init_gain is not None:
            orthogonal(model, workload.init_gain)
    return model


def load_workload(
    workload: Workload, seed: int, scratch_dir: Path | None, task: str = AUTO
) -> tuple[DataBundle, nn.Module]:
    """Datasets and model, with the weights that it starts from. Raises TrglError."""
    data = load_bundle(workload, seed, scratch_dir, task=task)
    model = build_for(workload, data, seed)
    if workload.weights is not None:
        fill_weights(workload, model, data.num_classes)
    return data, model


def fill_weights(
    workload: Workload, model: nn.Module, classes: int, written: Callable[[], None] | None = None
) -> Filled:
    """Give `model` the weights that `workload` names, but for a classifier of other classes; see `read_weights`."""
    assert workload.weights is not None
    skip = workload.weights_skip or ()
    return read_weights(Path(workload.weights), model, skip=skip, written=written, classes=classes)
