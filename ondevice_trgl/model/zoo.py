"""Models by name: our small residual networks, torchvision's classifiers, and `pkg.module:callable` of the user's."""

import importlib
import inspect
import re
import sys
from pathlib import Path

from torch import nn

from ondevice_trgl._torchvision import torchvision_module
from ondevice_trgl.errors import TrglError, UnknownNameError, UsageError
from ondevice_trgl.model.resnets import BasicBlock, PreactBlock, ResNet

_OWN = {
    "resnet-small": (BasicBlock, ((2, 16), (2, 32), (2, 64))),
    "resnet20": (BasicBlock, ((3, 16), (3, 32), (3, 64))),
    "resnet56": (BasicBlock, ((9, 16), (9, 32), (9, 64))),
    "resnet110": (BasicBlock, ((18, 16), (18, 32), (18, 64))),
}
_PREACT = re.compile(r"resnet-preact-([1-9]\d*)x([1-9]\d*)")

# Classifiers of torchvision that take any side of 64 pixels or more unless they say otherwise. Listed here so that
# an unknown name can be answered without importing torchvision (84 MB).
_TORCHVISION = (  # noqa: SIM905
    "alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161 densenet169 densenet201 "
    "efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6 "
    "efficientnet_b7 efficientnet_v2_l efficientnet_v2_m efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 "
    "mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf "
    "regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf regnet_x_8gf regnet_y_16gf regnet_y_1_6gf "
    "regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf regnet_y_8gf resnet101 resnet152 resnet18 resnet34 "
    "resnet50 resnext101_32x8d resnext101_64x4d resnext50_32x4d shufflenet_v2_x0_5 shufflenet_v2_x1_0 "
    "shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_b swin_s swin_t swin_v2_b swin_v2_s "
    "swin_v2_t vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 vit_h_14 vit_l_16 "
    "vit_l_32 wide_resnet101_2 wide_resnet50_2"
).split()


def model_names() -> list[str]:
    """Every name that `build_model` takes, the pattern `resnet-preact-MxC` and users' callables left out."""
    return sorted([*_OWN, *_TORCHVISION])


def check_model_name(name: str) -> None:
    """Raises UnknownNameError where no model is called `name`. Imports nothing."""
    if ":" not in name and name not in _OWN and name not in _TORCHVISION and not _PREACT.fullmatch(name):
        raise UnknownNameError(
            "model",
            name,
            [*model_names(), "resnet-preact-MxC"],
            hint="M blocks of C channels: resnet-preact-10x16; your own: --model pkg.module:callable",
        )


def needs_channels(name: str) -> int | None:
    """The number of image channels that model `name` insists on; None where it takes any."""
    return 3 if name in _TORCHVISION else None


def build_model(name: str, *, num_classes: int, in_shape: tuple[int, ...]) -> nn.Module:
    """A freshly initialised model for samples of `in_shape` (C, H, W). Draws from torch's global generator.

    A user's callable is given `num_classes` and `in_shape` where its signature has them. Raises UnknownNameError and
    UsageError. torchvision, where it is needed, costs 84 MB of RSS.
    """
    check_model_name(name)
    if ":" in name:
        return _users_model(name, num_classes, in_shape)
    if name in _OWN:
        block, stages = _OWN[name]
        return ResNet(block, stages, in_shape[0], num_classes)
    if match := _PREACT.fullmatch(name):
        return ResNet(PreactBlock, ((int(match[1]), int(match[2])),), in_shape[0], num_classes)
    arguments: dict[str, object] = {"weights": None, "num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        arguments |= {"aux_logits": False, "init_weights": True}
    if name.startswith(("vit_", "maxvit_")):
        if len(in_shape) != 3 or in_shape[1] != in_shape[2]:
            raise UsageError(f"model {name} needs square images, these are {in_shape}", hint="set --image-size")
        arguments |= {"image_size": in_shape[1]} if name.startswith("vit_") else {"input_size": in_shape[1:]}
    factory = getattr(torchvision_module().models, name)
    try:
        model = factory(**arguments)
    except Exception as error:
        raise UsageError(
            f"model {name} cannot be built for samples of shape {in_shape}: {error}", hint="try another --image-size"
        ) from error
    assert isinstance(model, nn.Module)
    return model


def _users_model(name: str, num_classes: int, in_shape: tuple[int, ...]) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)  # as `python -m` does; a console script would not find a model in this folder
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"model {name!r} cannot be imported: {error}", hint="write it as pkg.module:callable, importable from here"
        ) from error
    finally:
        sys.path.remove(here)
    known = {"num_classes": num_classes, "in_shape": in_shape}
    try:
        accepted = inspect.signature(factory).parameters
        model = factory(**{key: value for key, value in known.items() if key in accepted})
    except TrglError:
        raise
    except Exception as error:
        raise UsageError(f"model {name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {name!r} returned {type(model).__name__}, expected an nn.Module")
    return model
