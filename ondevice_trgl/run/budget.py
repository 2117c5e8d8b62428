"""The bytes that hold while a run trains: stated at the start, changed from any thread, kept by a limit, measured."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.device.limit import CODE_GROWTH_BYTES, Leftovers, MemoryLimit, lacks_memory
from ondevice_trgl.device.meter import PeakMeter
from ondevice_trgl.device.pages import release_code_pages
from ondevice_trgl.device.waiting import Waiting
from ondevice_trgl.errors import BudgetExceededError
from ondevice_trgl.run.hands import Hands
from ondevice_trgl.units import format_size

T = TypeVar("T")
_NOISE_BYTES = 12_000_000
"""A process between two modules holds that much more or less than at the start for no reason of the app's."""

_UNTOUCHED_BYTES = 24_000_000
"""Mapped by C code and hardly written to: no memory, but the allocator counts it, and refuses small blocks over it."""


@dataclass
class Period:
    """A stretch of a run under one budget; JSON-ready through `vars`."""

    budget_bytes: int
    measured_peak_bytes: int = 0


class Budget:
    """What the process may take now. `request` may be called from any thread, all else belongs to the run's own."""

    def __init__(
        self,
        budget_bytes: int,
        limit: MemoryLimit,
        meter: PeakMeter,
        *,
        frugal: bool = False,
        ask: Callable[[], int] | None = None,
    ) -> None:
        """`frugal`: hold the process to what is planned, where it is ours alone and the allocator gives back first.

        `ask` gives what may be taken now, which may change; None where it does not.
        """
        self.bytes = budget_bytes
        self._frugal = frugal and limit.gives_back
        self.limit, self._meter = limit, meter
        self.periods = [Period(budget_bytes)]
        self.is_tight = False
        """Whether the limit is below the budget, at what was planned."""
        limit.lift()
        self.hands = Hands(apart=limit.refuses_code)
        self._leftovers = self.hands.do(Leftovers)
        self.waiting = Waiting(self.hands.threads)
        limit.calibrate()  # a thread has started
        self._ask, self._asked = ask, budget_bytes
        self._more = self._at_start = self._grown = self._freed = 0

    def request(self, ask: Callable[[], int]) -> None:
        """From now on, `ask` gives what may be taken."""
        self._ask = ask

    @property
    def room(self) -> int:
        """The budget, less what the process holds more than at the start: what is an app's, training leaves to it."""
        return self.bytes - self._grown + self._freed

    @property
    def coming_room(self) -> int:
        """`room` once what `has_changed` saw is taken."""
        return self.room + self._asked - self.bytes

    def need_not_hold(self, planned_bytes: int) -> None:
        """Of what was planned, so much is not in memory any more."""
        self._freed += planned_bytes

    def has_changed(self, *, larger: bool) -> bool:
        """Look at what may be taken now, for `take`: less in any case, more only with `larger`."""
        self._meter.look()
        if self._ask is not None:
            self._asked = self._ask()
        return self._asked < self.bytes or (larger and self._asked > self.bytes)

    def take(self) -> None:
        """Let what `has_changed` saw be the budget that holds. Call `begin` when the process was fitted to it."""
        self.note_peak()
        self.bytes = self._asked
        if self.is_over():
            self.make_room()
        else:
            self.enforce()

    def begin(self) -> None:
        """From here on, the peak is held against the budget that was taken."""
        self._meter.reset()
        self.periods.append(Period(self.bytes))

    def enforce(self, planned_bytes: int | None = None) -> None:
        """Set the limit, from what the process holds now: at the budget, or at what is planned where that is less.

        An allocator keeps what is freed as long as it may: held to the plan, it leaves the rest to others.
        """
        held = self.bytes
        if planned_bytes is not None and self._frugal:
            held = min(held, planned_bytes + self._more + self._grown + CODE_GROWTH_BYTES + _UNTOUCHED_BYTES)
        self.is_tight = held < self.bytes
        if self.limit.can_hold(held - self._meter.others):
            self.limit.set(held - self._meter.others)
        else:
            self.limit.lift()  # the next step finds that more is in use than may be

    def start(self, floor_bytes: int) -> None:
        """Set the limit for the first time. A process that holds more than the planned floor may keep doing so."""
        self._meter.look()
        self.make_room()
        self._at_start = self._meter.current_bytes()
        self._more = max(0, self._at_start - floor_bytes)

    def between_modules(self) -> None:
        """Give back what is not in use, and see what the process has come to hold beside training."""
        self.make_room()
        self._grown = 0
        self.look_at_growth(self._at_start)

    def look_at_growth(self, held_bytes: int) -> None:
        """See what the process holds beside training, which held `held_bytes` by itself: `room` is without that."""
        grown = self.held_bytes() - held_bytes
        if grown > _NOISE_BYTES:
            self._grown = max(self._grown, grown + _NOISE_BYTES)  # nor is this exact

    def looks_at_growth(self) -> bool:
        """Whether what is in use between two steps shows it: an allocator that gives back late keeps more each time."""
        return not self.limit.gives_back

    def held_bytes(self) -> int:
        """What is in use now."""
        return self._meter.current_bytes()

    def end(self) -> None:
        """Put back the limit that was there before, and end the threads that were started."""
        self.limit.lift()
        self.waiting.close()
        self.hands.close()

    def make_room(self) -> None:
        """Give back everything that is not in use, then set the limit anew."""
        self.limit.lift()  # giving back takes a little itself, and may be called for where there is nothing left
        gc.collect()
        self.hands.do(self._leftovers.drop)
        if self.hands.renew():
            self._leftovers = self.hands.do(Leftovers)
        release_memory()
        release_code_pages()
        self.enforce()

    def attempt(self, work: Callable[[], T], what: str) -> T:
        """`work()`, and once more after giving memory back where it lacks some. Raises BudgetExceededError."""
        self.waiting.look()  # here, as every batch comes by, whatever is done with it
        try:
            return self.hands.do(work)
        except Exception as error:
            if not lacks_memory(error):
                raise
        self.make_room()
        try:
            return self.hands.do(work)
        except Exception as error:
            if not lacks_memory(error):
                raise
            raise self.exceeded(f"{what} needs more") from error

    def exceeded(self, why: str) -> BudgetExceededError:
        """The error that says so."""
        return BudgetExceededError(
            f"the budget of {format_size(self.bytes)} cannot be held: {why}",
            hint="resume with a larger --budget; nothing is lost",
        )

    def note_peak(self) -> int:
        """The meter's peak, noted for the present period."""
        peak = self._meter.peak_bytes()
        period = self.periods[-1]
        period.measured_peak_bytes = max(period.measured_peak_bytes, peak)
        return peak

    def is_over(self) -> bool:
        """Whether more is in use at this moment than the budget allows. Code pages, which no limit holds, do that."""
        return self._meter.current_bytes() > self.bytes
