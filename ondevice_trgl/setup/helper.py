"""A process that sets a run up, held to the budget as the run itself will be."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.allocator import tune
from ondevice_trgl.device.limit import MemoryLimit, lacks_memory, limit_for, refused_bytes
from ondevice_trgl.device.meter import PeakMeter, meter_for
from ondevice_trgl.device.pages import release_code_pages
from ondevice_trgl.errors import BudgetInfeasibleError, ConfigError
from ondevice_trgl.plan.memo import Memo, circumstances, memo_folder
from ondevice_trgl.run.guards import device_named
from ondevice_trgl.setup.requests import Took, too_large


class Lifetime(PeakMeter):
    """A meter that knows its highest peak whoever resets it. `others`: bytes that the caller holds beside it."""

    def __init__(self, meter: PeakMeter, others: int) -> None:
        self.name, self.kind = meter.name, meter.kind
        self._meter, self._others, self._before = meter, others, 0

    def reset(self) -> None:
        self._before = max(self._before, self._meter.peak_bytes())
        self._meter.reset()

    def peak_bytes(self) -> int:
        return self._meter.peak_bytes()

    def current_bytes(self) -> int:
        return self._meter.current_bytes()

    def highest_bytes(self) -> int:
        """Of this process and its caller; 0 where device memory is metered."""
        return max(self._before, self._meter.peak_bytes()) + self._others if self.kind == "rss" else 0


@dataclass(frozen=True)
class Helper:
    """What such a process works with."""

    config: TrainConfig
    folder: Path
    caller_bytes: int
    meter: Lifetime
    limit: MemoryLimit
    memo: Memo

    @property
    def room_bytes(self) -> int:
        """What this process may take, the caller waiting beside it: it holds nothing on a GPU."""
        return stated_budget(self.config) - (self.caller_bytes if self.meter.kind == "rss" else 0)


def stated_budget(config: TrainConfig) -> int:
    """The budget in bytes. Raises ConfigError where none was stated."""
    if config.budget_bytes is None:
        raise ConfigError(["budget: none was stated"], hint='TrainConfig(budget="600MB")')
    return config.budget_bytes


def as_helper(
    config: TrainConfig, folder: Path, caller_bytes: int, allocator: str, work: Callable[[Helper], None]
) -> Took:
    """Do `work` in a process held to the budget. Raises BudgetInfeasibleError where it does not fit into it."""
    tune(allocator)
    release_code_pages()  # what importing has touched
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    budget = stated_budget(config)
    device = device_named(config.device)
    with meter_for(device) as meter:
        lifetime, limit = Lifetime(meter, caller_bytes), limit_for(device)
        helper = Helper(config, folder, caller_bytes, lifetime, limit, Memo(memo_folder(), **circumstances(device)))
        if meter.kind == "rss" and meter.current_bytes() > helper.room_bytes:
            raise too_large(budget, lifetime.highest_bytes())  # under a limit below that it could not even say so
        limit.set(helper.room_bytes)
        try:
            work(helper)
        except BudgetInfeasibleError as refusal:
            if lifetime.highest_bytes() > refusal.smallest_feasible_budget_bytes:
                raise too_large(budget, lifetime.highest_bytes()) from refusal
            raise
        except Exception as error:
            if not lacks_memory(error):
                raise
            limit.lift()  # saying what happened takes memory too
            raise too_large(budget, lifetime.highest_bytes() + refused_bytes(error)) from error
        finally:
            limit.lift()
        if lifetime.highest_bytes() > budget:
            raise too_large(budget, lifetime.highest_bytes())
        return Took(lifetime.highest_bytes())
