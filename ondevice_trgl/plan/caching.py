"""What the boundaries of a plan take: where they are kept, in which number format, and how many bytes at one time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ondevice_trgl.cache.codec import NARROWER, row_bytes
from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import UsageError
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.units import format_size


@dataclass(frozen=True)
class Caching:
    """Boundaries of `rows` samples of `chain`, as `config` wants them kept; `most_pinned` on a GPU alone."""

    chain: Chain
    config: TrainConfig
    rows: int
    most_pinned: int | None

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Number formats that may be taken: as long as there is room, nothing is rounded."""
        return NARROWER if self.config.cache_dtype == "auto" else (self.config.cache_dtype,)

    @property
    def widest_two(self) -> int:
        """Most bytes of any two boundaries: the one that is read and the one that is written stand at a time."""
        return (
            2 * self.rows * max((row_bytes(a.out_shape, self.dtypes[0]) for a in self.chain.segments[:-1]), default=0)
        )

    @property
    def tier(self) -> str:
        """memory or disk."""
        if self.config.cache != "auto":
            return self.config.cache
        return "memory" if self.widest_two <= (self.most_pinned or 0) else "disk"

    def bytes(self, bounds: Sequence[int], dtype: str) -> int:
        """Most bytes of boundary activations at one time, with modules that `bounds` make."""
        sizes = [row_bytes(self.chain.segments[b - 1].out_shape, dtype) for b in bounds[1:-1]]
        if self.config.schedule == "parallel":  # behind the frozen front one stands while all else trains, and then
            last = sizes[-1:] if self.ends_apart(bounds) else []  # that of the classifier
            sizes = [*sizes[: sum(stop <= self.chain.prefix for stop in bounds[1:])], *last]
            return self.rows * max((a + b for a, b in zip([0, *sizes], sizes, strict=False)), default=0)
        return self.rows * max(a + b for a, b in zip([0, *sizes], [*sizes, 0], strict=True))

    def ends_apart(self, bounds: Sequence[int]) -> bool:
        """Whether the last module that `bounds` make is the classifier alone."""
        return len(bounds) > 2 and bounds[-2] == self.chain.trunk

    def dtype(self, bounds: Sequence[int]) -> str | None:
        """The widest format in which the boundaries between these modules keep to the limit; None where none does."""
        limit = self.config.cache_limit_bytes if self.tier == "disk" else None
        return next((d for d in self.dtypes if limit is None or self.bytes(bounds, d) <= limit), None)

    def least(self, ways: Iterable[Sequence[int]]) -> int:
        """Fewest bytes that any of these ways to make modules caches."""
        return min(self.bytes(bounds, dtype) for bounds in ways for dtype in self.dtypes)

    def no_room(self, ways: Iterable[Sequence[int]]) -> UsageError:
        """The error where none of them keeps to the limit, whatever the budget."""
        return UsageError(
            f"{self._cached(self.least(ways), 'every plan')}, whatever the budget",
            hint="raise --cache-limit, or lower the need: --cache-dtype int8, --train-limit, --image-size, "
            "--schedule parallel or --modules 1, which cache little or nothing",
        )

    def too_little_room(self, ways: Iterable[Sequence[int]]) -> str:
        """What to say where those that fit the budget do not keep to the limit, and others would."""
        return self._cached(self.least(ways), "every plan within the budget")

    def _cached(self, least: int, what: str) -> str:
        limit = format_size(self.config.cache_limit_bytes or 0)
        return f"{what} caches {format_size(least)} or more on disk, the limit is {limit}"
