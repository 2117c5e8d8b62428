"""Train a network module by module inside a memory budget (TRGL, arXiv 2309.17357).

The names below are imported when they are first used: the command line answers `--help` without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ondevice_trgl.config import TrainConfig
    from ondevice_trgl.errors import (
        BudgetExceededError,
        BudgetInfeasibleError,
        ConfigError,
        DataError,
        NonFiniteError,
        PartitionError,
        RunDirError,
        StorageError,
        TrglError,
        UsageError,
    )
    from ondevice_trgl.model.partition import LocalModule, Partition, partition
    from ondevice_trgl.plan.plan import Plan
    from ondevice_trgl.report.model import Report
    from ondevice_trgl.run.callbacks import Callback, RunState
    from ondevice_trgl.trainer import Trainer

__all__ = [
    "BudgetExceededError",
    "BudgetInfeasibleError",
    "Callback",
    "ConfigError",
    "DataError",
    "LocalModule",
    "NonFiniteError",
    "Partition",
    "PartitionError",
    "Plan",
    "Report",
    "RunDirError",
    "RunState",
    "StorageError",
    "TrainConfig",
    "Trainer",
    "TrglError",
    "UsageError",
    "partition",
]
__version__ = "0.1.0"

_HOMES = {
    "TrainConfig": "ondevice_trgl.config",
    "LocalModule": "ondevice_trgl.model.partition",
    "Partition": "ondevice_trgl.model.partition",
    "partition": "ondevice_trgl.model.partition",
    "Plan": "ondevice_trgl.plan.plan",
    "Report": "ondevice_trgl.report.model",
    "Callback": "ondevice_trgl.run.callbacks",
    "RunState": "ondevice_trgl.run.callbacks",
    "Trainer": "ondevice_trgl.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "ondevice_trgl.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
