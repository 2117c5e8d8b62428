"""BatchNorm: the layer whose output depends on what else is in the batch."""

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ondevice_trgl.model.trace import Chain


def batch_norms(module: nn.Module) -> Iterator[_BatchNorm]:
    """Every BatchNorm layer inside `module`."""
    yield from (layer for layer in module.modules() if isinstance(layer, _BatchNorm))


def has_batch_norm(chain: Chain) -> bool:
    """Whether accumulating the gradients of micro-batches gives something else than the full batch."""
    return next(batch_norms(chain.model), None) is not None
