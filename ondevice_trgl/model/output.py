"""What a network returns, read as logits: one tensor, or a record with a field of that name."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ondevice_trgl.errors import PartitionError


def logits_of(returned: Any, network: str) -> Tensor:
    """The logits in what `network` returned: the tensor, `.logits` or ["logits"] of a record, the one item of a tuple.

    Raises PartitionError, which says what there is instead.
    """
    if isinstance(returned, Tensor):
        return returned
    if isinstance(returned, Mapping):
        fields = {str(name): value for name, value in returned.items()}
    elif isinstance(returned, tuple | list):
        names = getattr(returned, "_fields", None) or range(len(returned))
        fields = {str(name): value for name, value in zip(names, returned, strict=True)}
    else:
        fields = dict(getattr(returned, "__dict__", {}))
    logits = fields.get("logits")
    if isinstance(logits, Tensor):
        return logits
    tensors = [value for value in fields.values() if isinstance(value, Tensor)]
    if len(fields) == 1 and tensors:
        return tensors[0]
    inside = f" with {', '.join(fields)}" if fields else ""
    raise PartitionError(
        f"{network}.forward returns a {type(returned).__name__}{inside}, expected one tensor, or a field 'logits'",
        hint="wrap the network so that it returns its logits alone",
    )
