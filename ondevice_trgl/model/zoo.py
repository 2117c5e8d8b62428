"""Models by name: our small residual networks, torchvision's classifiers, and `pkg.module:callable` of the user's."""

import importlib
import inspect

from torch import nn

from ondevice_trgl._torchvision import torchvision_module
from ondevice_trgl.errors import TrglError, UsageError
from ondevice_trgl.imported import found_here
from ondevice_trgl.model.names import PREACT, check_model_name
from ondevice_trgl.model.resnets import BasicBlock, PreactBlock, ResNet, frozen_stem

_OWN = {
    "resnet-small": (BasicBlock, ((2, 16), (2, 32), (2, 64))),
    "resnet20": (BasicBlock, ((3, 16), (3, 32), (3, 64))),
    "resnet56": (BasicBlock, ((9, 16), (9, 32), (9, 64))),
    "resnet110": (BasicBlock, ((18, 16), (18, 32), (18, 64))),
}


def build_model(name: str, *, num_classes: int, in_shape: tuple[int, ...]) -> nn.Module:
    """A freshly initialised model for samples of `in_shape` (C, H, W). Draws from torch's global generator.

    A user's callable is given `num_classes` and `in_shape` where its signature has them. Raises UnknownNameError and
    UsageError. torchvision, where it is needed, costs 15 MB of RSS.
    """
    check_model_name(name)
    if ":" in name:
        return _users_model(name, num_classes, in_shape)
    if name in _OWN:
        block, stages = _OWN[name]
        return ResNet(block, stages, in_shape[0], num_classes)
    if match := PREACT.fullmatch(name):
        modules, blocks, channels = int(match[2]), int(match[3] or 1), int(match[4])
        network = ResNet(PreactBlock, ((modules * blocks, channels),), in_shape[0], num_classes, group=blocks)
        return frozen_stem(network, in_shape[0]) if match[1] == "frozen" else network
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
    try:
        with found_here():
            factory = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise UsageError(
            f"model {name!r} cannot be imported: {error}", hint="write it as pkg.module:callable, importable from here"
        ) from error
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
