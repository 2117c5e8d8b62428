"""What the process held while it trained, from time to time: few points, however long that takes."""

import time
from collections.abc import Callable, Mapping, Sequence

MOST = 240
"""Points that are kept. Of more, two neighbours become one, the one that held more."""
_FIRST_SECONDS = 0.1


class Timeline:
    """Points of (seconds since the run began, bytes, module). Memory: a few kilobytes.

    `held()` is what is in use now, `earlier` are the points of sittings before, whose time was up to `began`.
    """

    def __init__(
        self,
        held: Callable[[], int],
        earlier: Sequence[Mapping[str, float]] = (),
        began: float = 0.0,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._held, self._clock = held, clock
        self.points = [(float(p["seconds"]), int(p["bytes"]), int(p["module"])) for p in earlier]
        self._began = clock() - began
        self._every, self._next = _FIRST_SECONDS, clock()
        while len(self.points) > MOST:
            self._thin()

    def look(self, module: int) -> None:
        """To be called between two steps, or batches: a point, where the last one is long enough ago."""
        now = self._clock()
        if now < self._next:
            return
        self.points.append((now - self._began, self._held(), module))
        if len(self.points) > MOST:
            self._thin()
        self._next = now + self._every

    def _thin(self) -> None:
        pairs = [self.points[at : at + 2] for at in range(0, len(self.points), 2)]
        self.points = [max(pair, key=lambda point: point[1]) for pair in pairs]
        self._every *= 2

    def records(self) -> tuple[dict[str, float], ...]:
        """JSON-ready: seconds, bytes, module."""
        return tuple({"seconds": round(s, 2), "bytes": held, "module": module} for s, held, module in self.points)
