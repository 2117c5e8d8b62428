"""A network as it can be traced: out of its wrappers, its lazy layers made, its tensors each with memory of its own."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ondevice_trgl.errors import PartitionError, first_line
from ondevice_trgl.model.store import tensors_of
from ondevice_trgl.model.tensorfile import DTYPES


def unwrapped(model: nn.Module, example: Tensor) -> nn.Module:
    """`model` out of DataParallel and torch.compile, its lazy layers made by a forward pass. Raises PartitionError."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # of torch.compile
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if isinstance(model, torch.jit.ScriptModule):
        raise PartitionError(
            f"{type(model).__name__} is TorchScript, which cannot be cut", hint="give the network that it was made from"
        )
    if any(is_lazy(tensor) for _, tensor in tensors_of(model)):
        modes = {layer: layer.training for layer in model.modules()}
        try:
            with torch.no_grad():
                model.eval()(example.clone())
        except Exception as error:
            raise PartitionError(
                f"{type(model).__name__} has lazy layers, and does not accept an input of {tuple(example.shape)}: "
                f"{first_line(error)}",
                hint="run it once on a batch of yours first",
            ) from error
        finally:
            for layer, training in modes.items():
                layer.training = training
    return model


def check_tensors(model: nn.Module) -> None:
    """Raises PartitionError where two tensors of `model` share memory, one of them being trained; or one has no file.

    Each module's tensors are loaded by themselves, and would not be tied any more.
    """
    names: dict[int, tuple[str, Tensor]] = {}
    tensors = dict(tensors_of(model))
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise PartitionError(
                f"{name} is a tensor of layout {tensor.layout}, expected a dense one",
                hint="hold it dense, and make it sparse in forward",
            )
        if tensor.dtype not in DTYPES.values():
            raise PartitionError(
                f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, which no weights file holds",
                hint="expected float, bfloat16, complex64, int or bool",
            )
        if isinstance(tensor, nn.Parameter) and getattr(tensor, "_post_accumulate_grad_hooks", None):
            raise PartitionError(
                f"{name} has a hook behind its gradient (register_post_accumulate_grad_hook)",
                hint="remove it: a hook that updates or drops gradients is in the way of the optimizer's own",
            )
        if not tensor.numel() or isinstance(tensors.get(f"{name}_orig"), nn.Parameter):
            continue  # nn.utils.spectral_norm and prune make `weight` of `weight_orig` in each pass
        first, other = names.setdefault(tensor.untyped_storage().data_ptr(), (name, tensor))
        if other is not tensor and (isinstance(tensor, nn.Parameter) or isinstance(other, nn.Parameter)):
            raise PartitionError(
                f"{first} and {name} are two tensors in the same memory",
                hint="tie them as one: assign the same Parameter to both, like b.weight = a.weight in place of "
                "b.weight.data = a.weight.data",
            )
