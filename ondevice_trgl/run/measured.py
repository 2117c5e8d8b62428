"""What a module did, and the way out of a run that was asked to pause."""

from dataclasses import dataclass


class Paused(Exception):  # noqa: N818 -- no error: the way out of the loop after a requested pause
    """The run was asked to pause and has checkpointed."""


@dataclass
class Measured:
    """What one module did, over all laps; JSON-ready through `vars`."""

    params: int = 0
    measured_peak_bytes: int = 0
    train_seconds: float = 0.0
    cache_seconds: float = 0.0
    cache_read_bytes: int = 0
    cache_write_bytes: int = 0
    cache_dtype: str | None = None
    """Number format in which its boundary was kept; None where it has none."""
    cache_error: float | None = None
    """What of the boundary was lost by that: root mean square by that of the values, at most."""
    epochs_done: float = 0.0
    train_loss: float | None = None
    transport_cost: float | None = None
    multiplier: float | None = None
    """lambda as it stands in this lap, or stood at the end of the last; None where nothing is weighed by it."""
    train_accuracy: float | None = None
    """The task's metric, whichever that is; of a regression the root of the mean squared error beside."""
    val_accuracy: float | None = None
    test_accuracy: float | None = None
    train_rmse: float | None = None
    val_rmse: float | None = None
    test_rmse: float | None = None
    best_epoch: int | None = None
    """Of the lap: the epoch, from 0, with the best accuracy on validation data, where that is looked at every epoch."""
    best_val: float | None = None
    judged: int = 0
    """Epochs of the lap that were."""
    validation_seconds: float = 0.0
    frozen: bool = False
    """None of the module's own parameters is trained; its auxiliary head is."""
    passed: bool = False
    """It is part of the frozen front, which has no heads and no accuracies."""

    @property
    def is_done(self) -> bool:
        """Whether it was trained, or passed through, to the end of a lap."""
        return self.train_accuracy is not None or (self.passed and self.cache_seconds > 0)
