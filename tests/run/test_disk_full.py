"""The disk is full at the k-th write of a run: a clear error, nothing half-written, and it goes on when there is room.

Also a clock that is set back, which nothing of a training asks.
"""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ondevice_trgl import durable
from ondevice_trgl.errors import StorageError
from ondevice_trgl.model import tensorfile
from ondevice_trgl.model.store import is_evicted
from tests.run.conftest import Fit, net
from tests.run.test_resume import Whole


class Disk:
    """Has room for so many writes."""

    def __init__(self, room: float) -> None:
        self.room, self.writes = room, 0

    def write(self) -> None:
        self.writes += 1
        if self.writes > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class File:
    """One on such a disk."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *given: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        self._disk.write()
        written: int = self._file.write(data)
        return written


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk(float("inf"))

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            found.write()
            return function(*args)

        return call

    for module in (durable, tensorfile):
        fresh = module.fresh
        monkeypatch.setattr(module, "fresh", lambda *args, fresh=fresh: File(fresh(*args), found))
    for name in ("pwrite", "posix_fallocate"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    return found


@pytest.mark.parametrize("schedule", ["sequential", pytest.param("parallel", marks=pytest.mark.long)])
def test_at_whichever_write_the_disk_is_full_nothing_is_lost(schedule: str, fit: Fit, whole: Whole, disk: Disk) -> None:
    given: dict[str, Any] = {"schedule": schedule, "checkpoint_every": "2steps"}
    expected = whole(**given)
    writes, disk.writes = disk.writes, 0
    assert writes > 60
    for k in range(4):
        disk.room, disk.writes = writes * k // 4, 0
        model, name = net(), f"run{k}"
        with pytest.raises(StorageError) as full:
            fit(name, model=model, **given)
        assert "No space left on device" in full.value.message
        disk.room = float("inf")
        begun = (fit.path(name) / "config.json").is_file()
        assert is_evicted(model) == begun  # else the caller has his weights back
        assert not list(fit.folder.rglob(".*.tmp"))
        fit(name, model=model, resume=begun, force=not begun, **given)
        assert fit.weights(name) == expected
        assert not list(fit.folder.glob(".trgl-*"))


def test_a_clock_that_is_set_back_or_ahead_changes_nothing(
    fit: Fit, whole: Whole, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = whole()
    steps = iter(range(10**9))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 10**6 * (-1) ** next(steps))
    report = fit("run")
    assert fit.weights("run") == expected
    assert 0 < report.seconds.total < 600
    assert report.seconds.training >= 0
