"""The only module that imports torchvision, and the way round a torchvision whose binary part does not load."""

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

from ondevice_trgl.errors import UsageError

_SCHEMAS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))
# A torch.library.Library takes its operators away again when it is collected.
_kept: list[torch.library.Library] = []


def torchvision_module() -> ModuleType:
    """torchvision, imported on the first call (15 MB of RSS).

    A torchvision wheel built for another torch (CUDA beside a CPU torch, or the other way round) cannot load its
    binary part, and its import stops at `operator torchvision::nms does not exist`. Models, transforms and datasets
    need no binary operator, so the two schemas that the import looks for are defined first and it is tried again.

    Raises UsageError where torchvision is absent or cannot be imported.
    """
    try:
        return _import()
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise _unusable(error) from error
    _forget()
    _define_schemas()
    try:
        return _import()
    except RuntimeError as error:
        raise _unusable(error) from error


def _import() -> ModuleType:
    try:
        with warnings.catch_warnings(), _without_dynamo():
            # The same missing binary part: only reading image files through torchvision would need it.
            warnings.filterwarnings("ignore", message="Failed to load image Python extension", category=UserWarning)
            return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "torchvision":
            raise _unusable(error) from error
        raise UsageError(
            "torchvision is not installed; zoo models from torchvision and the datasets cifar10, cifar100 and stl10"
            " need it",
            hint="`pip install torchvision`, in the version that matches the installed torch",
        ) from None
    except ImportError as error:
        raise _unusable(error) from error


@contextlib.contextmanager
def _without_dynamo() -> Iterator[None]:
    """torchvision.ops asks torch._dynamo one thing while it is imported, whether RoI align can be compiled: 75 MB and
    two seconds for a no. A stand-in answers it, unless torch._dynamo is there already.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    package, utils = ModuleType("torch._dynamo"), ModuleType("torch._dynamo.utils")
    package.utils = utils  # type: ignore[attr-defined]
    utils.is_compile_supported = lambda device_type: False  # type: ignore[attr-defined]
    stand_ins = {"torch._dynamo": package, "torch._dynamo.utils": utils}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def _forget() -> None:
    """Take the half-imported package out, or the next import would find its pieces."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def _define_schemas() -> None:
    if _kept:
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _kept.append(library)


def _unusable(error: Exception) -> UsageError:
    return UsageError(
        f"torchvision is installed but cannot be imported: {error}",
        hint=f"install the torchvision that matches torch {torch.__version__}",
    )
