"""When training rests, as a guest on somebody's device: the part of `TrainConfig` that conditions ask for."""

from collections.abc import Callable
from dataclasses import dataclass

from ondevice_trgl import checks
from ondevice_trgl.checks import Checked, setting


@dataclass(frozen=True, kw_only=True)
class ConditionSettings(Checked):
    """What has to hold while training computes. Looked at between two steps, or batches."""

    nice: float = setting(100.0, checks.number(0.0, 100.0, open_below=True))
    """At most this share of the time is computed, in percent: behind each step training rests for the others'."""
    max_celsius: float | None = setting(None, checks.number(0.0, 150.0, words=(None,)))
    """Training waits while the hottest thermal zone of the machine is hotter, until it is 5 degrees cooler."""
    min_battery: float | None = setting(None, checks.number(0.0, 100.0, words=(None,)))
    """Training waits while the battery that the machine runs on has less, in percent, until it has 5 more."""
    max_load: float | None = setting(None, checks.number(0.0, 100.0, words=(None,)))
    """Training waits while other processes take more of all cores, in percent, until they take 10 less."""
    wait_while: str | Callable[[], object] | None = setting(None, checks.function("", optional=True))
    """Training waits while this function says so, which takes nothing and returns true or false, or why in words: an
    app that is in the foreground. Itself or as pkg.module:callable; asked between two steps and five times a second."""
