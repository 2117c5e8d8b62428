"""A guest on somebody's device: between two steps, training rests as asked to, while it is too hot or too empty."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device import sensors
from ondevice_trgl.errors import UsageError
from ondevice_trgl.imported import function_named

_COOLER, _FULLER, _IDLER = 5.0, 5.0, 10.0
"""Degrees and percent by which it has to be better before training goes on, so that it does not flutter."""
_LOOK_SECONDS = 5.0
"""Between two looks at the sensors: what they say changes slowly."""
_SLICE_SECONDS = 0.2
"""Of a rest, behind which a pause that was asked for is seen."""
_TOO_SHORT_SECONDS = 1e-6
"""To be slept for."""
_MOST_SPENT = 10.0
"""Seconds that are rested for at most: longer ones between two steps were no computing."""


@dataclass(frozen=True)
class _Limit:
    """What has to hold: `reading()` on the right side of `bound`, and of `again` before training goes on."""

    setting: str
    reason: str
    name: str
    unit: str
    reading: Callable[[], float | None]
    bound: float
    again: float

    def holds(self, value: float, bound: float) -> bool:
        return value <= bound if self.again <= self.bound else value >= bound

    def why(self, value: float) -> str:
        return f"{self.name} at {value:.0f} {self.unit}, goes on at {self.again:.0f} {self.unit}"


class Conditions:
    """Rests as the `ConditionSettings` of `config` say. Raises UsageError where one cannot be read here.

    `told` is given why training waits, and "" when it goes on; `asked` says whether a pause was asked for meanwhile,
    which ends any rest.
    """

    def __init__(
        self,
        config: TrainConfig,
        asked: Callable[[], bool],
        told: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._asked, self._told, self._clock, self._sleep = asked, told, clock, sleep
        self._share = config.nice / 100.0
        self._limits = []
        if (hottest := config.max_celsius) is not None:
            cooler = hottest - _COOLER
            self._limits.append(_Limit("max_celsius", "heat", "the device", "°C", sensors.celsius, hottest, cooler))
        if (least := config.min_battery) is not None:
            again = min(100.0, least + _FULLER)
            charge = sensors.battery_percent
            self._limits.append(_Limit("min_battery", "battery", "the battery", "%", charge, least, again))
        if (most := config.max_load) is not None:
            again = max(0.0, most - _IDLER)
            self._limits.append(
                _Limit("max_load", "load", "what others compute", "%", sensors.Load().percent, most, again)
            )
        says = config.wait_while
        self._says = function_named(says, "wait_while", "") if isinstance(says, str) else says
        for limit in self._limits:
            if limit.reading() is None:
                flag = f"--{limit.setting.replace('_', '-')}"
                raise UsageError(f"{limit.setting}: this machine does not tell of any", hint=f"leave out {flag}")
        self.waited = {"nice": 0.0, "heat": 0.0, "battery": 0.0, "load": 0.0, "app": 0.0}
        """Seconds rested, by reason."""
        self._went_on, self._looked = clock(), float("-inf")

    def rest(self) -> None:
        """To be called between two steps, or batches: returns when training may go on, or a pause was asked for."""
        now = self._clock()
        if self._share < 1.0:
            spent = min(_MOST_SPENT, now - self._went_on)
            self._wait(spent * (1.0 / self._share - 1.0), "nice")
        if self._limits and now - self._looked >= _LOOK_SECONDS:
            for limit in self._limits:
                self._wait_for(limit)
            self._looked = self._clock()
        if self._says is not None and (why := self._says()):
            self._told(why if isinstance(why, str) else "the app asks for it")
            while why and not self._asked():
                self._wait(_SLICE_SECONDS, "app")
                why = self._says()
            self._told("")
        self._went_on = self._clock()

    def _wait_for(self, limit: _Limit) -> None:
        value = limit.reading()
        if value is None or limit.holds(value, limit.bound):
            return
        self._told(limit.why(value))
        while value is not None and not limit.holds(value, limit.again) and not self._asked():
            self._wait(_LOOK_SECONDS, limit.reason)
            value = limit.reading()
        self._told("")

    def _wait(self, seconds: float, reason: str) -> None:
        began = self._clock()
        while (left := began + seconds - self._clock()) > _TOO_SHORT_SECONDS and not self._asked():
            self._sleep(min(left, _SLICE_SECONDS))
        self.waited[reason] += self._clock() - began

    def rested(self) -> float:
        """Seconds rested so far, for whatever reason."""
        return sum(self.waited.values())

    def facts(self) -> dict[str, float]:
        """Seconds rested by reason, as `waited_for_*`; those that there were."""
        return {f"waited_for_{reason}": seconds for reason, seconds in self.waited.items() if seconds}


def check_conditions(config: TrainConfig) -> None:
    """Raises UsageError where what `config` asks for cannot be read here, or imported."""
    Conditions(config, lambda: False, lambda why: None)
