"""The bytes that hold while a run trains: stated at the start, changed from any thread, kept by a limit, measured."""

import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.device.limit import CODE_GROWTH_BYTES, Leftovers, MemoryLimit, lacks_memory
from ondevice_trgl.device.meter import PeakMeter
from ondevice_trgl.device.pages import release_code_pages
from ondevice_trgl.errors import BudgetExceededError
from ondevice_trgl.run.hands import Hands
from ondevice_trgl.units import format_size

T = TypeVar("T")


@dataclass
class Period:
    """A stretch of a run under one budget; JSON-ready through `vars`."""

    budget_bytes: int
    measured_peak_bytes: int = 0


class Budget:
    """What the process may take now. `request` may be called from any thread, all else belongs to the run's own."""

    def __init__(self, budget_bytes: int, limit: MemoryLimit, meter: PeakMeter, *, frugal: bool = False) -> None:
        """`frugal`: hold the process to what is planned, where it is ours alone and the allocator gives back first."""
        self.bytes = budget_bytes
        self._frugal = frugal and limit.gives_back
        self.limit, self._meter = limit, meter
        self.periods = [Period(budget_bytes)]
        self.is_tight = False
        """Whether the limit is below the budget, at what was planned."""
        limit.lift()
        self.hands = Hands(apart=limit.refuses_code)
        self._leftovers = self.hands.do(Leftovers)
        limit.calibrate()  # a thread has started
        self._more = 0
        self._lock = threading.Lock()
        self._asked: int | None = None

    def request(self, budget_bytes: int) -> None:
        """Ask for another budget, which `take` will hand out."""
        with self._lock:
            self._asked = budget_bytes

    @property
    def is_asked(self) -> bool:
        """Whether another budget was requested and not taken so far."""
        return self._asked is not None

    def take(self, *, larger: bool) -> bool:
        """Make a requested budget the one that holds; one that is larger only with `larger`. Whether it changed."""
        if self._asked is None:
            return False
        with self._lock:
            asked = self._asked
            if asked is None or (asked > self.bytes and not larger):
                return False
            self._asked = None
        if asked == self.bytes:
            return False
        self.note_peak()
        self.bytes = asked
        self.make_room()
        self._meter.reset()
        self.periods.append(Period(asked))
        return True

    def enforce(self, planned_bytes: int | None = None) -> None:
        """Set the limit, from what the process holds now: at the budget, or at what is planned where that is less.

        An allocator keeps what is freed as long as it may: held to the plan, it leaves the rest to others.
        """
        held = self.bytes
        if planned_bytes is not None and self._frugal:
            held = min(held, planned_bytes + self._more + CODE_GROWTH_BYTES)
        self.is_tight = held < self.bytes
        self.limit.set(held)

    def start(self, floor_bytes: int) -> None:
        """Set the limit for the first time. A process that holds more than the planned floor may keep doing so."""
        self.make_room()
        self._more = max(0, self._meter.current_bytes() - floor_bytes)

    def end(self) -> None:
        """Put back the limit that was there before, and end the thread that was started."""
        self.limit.lift()
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
