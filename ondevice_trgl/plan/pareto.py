"""The choices that no other beats in predicted bytes, seconds an epoch and disk bytes."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A way to train the whole network, every module alike; what `plan` lists beside the plan it makes."""

    modules: int
    micro_batch: int
    checkpointed: bool
    cache_dtype: str
    predicted_peak_bytes: int
    seconds_per_epoch: float | None
    """An estimate, summed over the modules: of each the seconds of a rehearsed micro-batch times those of an epoch, and
    one sweep of all samples spread over the epochs. Rehearsed steps are first ones, so that it is on the high side.
    None where a module was not rehearsed at that micro-batch, or the cache had another number format."""
    cache_bytes: int


def unbeaten(choices: Iterable[Choice]) -> tuple[Choice, ...]:
    """Those that no other beats, the largest peak first; of equals the first.

    Where seconds are not known, what does no more work is taken to be no slower, and nothing else is: as few modules or
    fewer, no smaller a micro-batch, checkpointed only if the other is.
    """
    found: list[Choice] = []
    for one in choices:
        if not any(_is_no_worse(other, one) for other in found):
            found = [other for other in found if not _is_no_worse(one, other)]
            found.append(one)
    return tuple(sorted(found, key=lambda choice: (-choice.predicted_peak_bytes, choice.cache_bytes)))


def thinned(choices: Iterable[Choice], apart: float = 0.03) -> tuple[Choice, ...]:
    """Of `unbeaten` choices those that a person can tell apart: each with a peak less by `apart` than the one before.

    Those with seconds stay, and the smallest.
    """
    given = tuple(choices)
    kept: list[Choice] = []
    last: dict[str, int] = {}
    for one in given:
        is_smallest = one.predicted_peak_bytes == given[-1].predicted_peak_bytes
        peak = last.get(one.cache_dtype)
        is_near = peak is not None and one.predicted_peak_bytes > (1.0 - apart) * peak
        if is_near and one.seconds_per_epoch is None and not is_smallest:
            continue
        last[one.cache_dtype] = one.predicted_peak_bytes
        kept.append(one)
    return tuple(kept)


def _is_no_worse(one: Choice, other: Choice) -> bool:
    if one.predicted_peak_bytes > other.predicted_peak_bytes or one.cache_bytes > other.cache_bytes:
        return False
    if one.seconds_per_epoch is not None and other.seconds_per_epoch is not None:
        return one.seconds_per_epoch <= other.seconds_per_epoch
    return (
        one.modules <= other.modules
        and one.micro_batch >= other.micro_batch
        and one.checkpointed <= other.checkpointed
        # narrower is less exact: it is not better for being so
        and (one.cache_dtype == other.cache_dtype or one.cache_dtype == "fp32")
    )
