"""Train and eval mode as the network's own code means them: some layers may keep to one of the two."""

from dataclasses import dataclass

from torch import nn

from ondevice_trgl.errors import PartitionError, UsageError
from ondevice_trgl.model.untouched import untouched


@dataclass(frozen=True)
class Modes:
    """`kept`: by path, the mode (`training`) that a module has whatever the network's own is."""

    kept: dict[str, bool]

    @classmethod
    def of(cls, model: nn.Module, *, freeze_norms: bool = False) -> "Modes":
        """What `model.train()` and `model.eval()` do, overridden or not.

        A module that was put into eval mode by hand while the network is in train mode stays there: so do pretrained
        norms that are to keep their statistics, and with `freeze_norms` all that have any. Raises PartitionError where
        a module does the opposite of its network, UsageError where no norm has statistics to freeze.
        """
        by_hand = {path for path, module in model.named_modules() if model.training and not module.training}
        if freeze_norms:
            by_hand |= _with_statistics(model)
        with untouched(model):
            model.eval()
            evaluating = {path: module.training for path, module in model.named_modules()}
            model.train()
            training = {path: module.training and path not in by_hand for path, module in model.named_modules()}
        odd = [path for path in training if evaluating[path] and not training[path]]
        if odd:
            raise PartitionError(
                f"{odd[0] or type(model).__name__} is in train mode when the network evaluates, and in eval mode when "
                "it trains",
                hint="mend train() of the network",
            )
        return cls({path: mode for path, mode in training.items() if mode == evaluating[path]})

    def apply(self, model: nn.Module, *, training: bool) -> None:
        """Put `model` into a mode."""
        for path, module in model.named_modules():
            module.training = self.kept.get(path, training)


def _with_statistics(model: nn.Module) -> set[str]:
    found = {path for path, layer in model.named_modules() if layer._buffers.get("running_mean") is not None}
    if not found:
        raise UsageError(
            f"freeze_norms: no norm of {type(model).__name__} has running statistics to keep",
            hint="leave it out (--freeze-norms): norms without statistics do the same in both modes",
        )
    return found
