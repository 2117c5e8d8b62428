"""How few samples a micro-batch of a module may have: what its norms, and those of its auxiliary head, can train on."""

import functools
from itertools import pairwise

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import ConfigError, DataError, PartitionError, TrglError
from ondevice_trgl.model.norms import Norm, norms_of, norms_of_head
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.model.tuning import parameters_of


class Fewest:
    """Of any consecutive segments of `chain` as one module."""

    def __init__(self, chain: Chain, config: TrainConfig) -> None:
        self._chain, self._config = chain, config
        self._norms = norms_of(chain)
        self._trained = [any(p.requires_grad for p in parameters_of(chain, s.nodes)) for s in chain.segments]
        self.worst = functools.cache(self._worst)

    @property
    def exact(self) -> bool:
        """Whether accumulating the gradients of micro-batches gives those of the full batch."""
        heads = (norm for stop in range(1, len(self._norms)) for norm in self._of_head(stop))
        return not any(norm.mixes for norm in (*sum(self._norms, ()), *heads))

    def __call__(self, start: int, stop: int) -> int:
        """The least micro-batch of segments `start` to `stop` (exclusive) with their head."""
        norm = self.worst(start, stop)
        return 1 if norm is None or norm.least is None else norm.least

    def _worst(self, start: int, stop: int) -> Norm | None:
        """The norm that asks for most samples there, and for more than one; None where there is none."""
        trains = any(self._trained[start:stop])  # else it stays in eval mode
        own = [norm for norm in sum(self._norms[start:stop], ()) if trains or norm.always]
        asking = [norm for norm in (*own, *self._of_head(stop)) if norm.least is not None and norm.least > 1]
        return max(asking, key=lambda norm: norm.least or 0, default=None)

    def _of_head(self, stop: int) -> tuple[Norm, ...]:
        if stop >= len(self._norms) or stop <= self._chain.prefix:
            return ()
        behind, classes = self._chain.segments[stop - 1], self._chain.num_outputs
        return norms_of_head(self._config.head, behind.out_shape, classes, behind.channel_axis, behind.head_limit)

    def too_few(self, micro: int, batch: int, bounds: tuple[int, ...]) -> TrglError:
        """The refusal of micro-batches of `micro`, the most that was asked for, of modules with `bounds`."""
        norm = next(
            worst
            for span in pairwise(bounds)
            if (worst := self.worst(*span)) is not None and (worst.least or 0) > micro
        )
        why = f"{norm} gets one value a channel of each sample, and cannot train on fewer than {norm.least} samples"
        fixed, samples = self._config.micro_batch, f"{micro} sample{'s' * (micro > 1)}"
        if isinstance(fixed, int) and batch > micro:
            came = "" if fixed == micro else f" (the most that divides {batch})"
            fault = f"micro_batch = {fixed}: {why} at a time, these have {samples}{came}"
            return ConfigError([fault], source="TrainConfig", hint=f"--micro-batch auto, or {norm.least} and more")
        if batch < self._config.batch_size:
            return DataError(
                f"the train set has {samples}: {why} at a time",
                hint=f"give it {norm.least} samples or more, or take the layer out",
            )
        fault = f"batch_size = {batch}: {why} at a time"
        return ConfigError([fault], source="TrainConfig", hint=f"--batch-size {norm.least} or more")


def check_norms(chain: Chain) -> None:
    """Raises PartitionError for a norm that no number of samples is enough for."""
    for norm in (norm for norms in norms_of(chain) for norm in norms):
        if norm.least is None:
            raise PartitionError(
                f"{norm} gets one value a channel of each sample, and cannot be trained on that at any batch size",
                hint="give larger inputs (--image-size), or take the layer out",
            )
