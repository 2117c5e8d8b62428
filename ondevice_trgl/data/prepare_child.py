"""The process that decodes pictures, `ask("prepare", ...)`: without torch, so that what it holds is one picture.

It writes them where every later process reads them (prepared.py), or else to a file that whoever asks has opened.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ondevice_trgl.data.decode import Fit, TooLargeError, decode_bytes, decode_within, size_of
from ondevice_trgl.data.entries import shown
from ondevice_trgl.data.pictures import pictures_named
from ondevice_trgl.data.prepared import is_there, key_of, prepared_dir, store
from ondevice_trgl.device.allocator import release_memory, tune
from ondevice_trgl.device.meter import own_peak_rss
from ondevice_trgl.errors import BudgetInfeasibleError, DataError, StorageError
from ondevice_trgl.processes import answer, tell
from ondevice_trgl.tasks import AUTO, CLASSES
from ondevice_trgl.units import format_size

_LARGE_BYTES = 16_000_000
"""After a picture that took so much, the allocator gives back what it kept."""
_SPARE_BYTES = 4_000_000
"""What listing, hashing and writing take beside a picture."""
_LEAST_SECONDS = 2.0
"""Less work than that is not worth a line."""


class Progress:
    """Lines on the way through `count` pictures, one every tenth, where all of it takes longer than a moment."""

    def __init__(
        self, count: int, say: Callable[[str], None] | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._count, self._say, self._clock = count, say, clock
        self._start, self._done, self._said = clock(), 0, 0

    def step(self) -> None:
        """One more picture is done."""
        self._done += 1
        tenths = 10 * self._done // self._count
        if self._say is None or tenths == self._said:
            return
        if self._said or (self._clock() - self._start) * self._count / self._done > _LEAST_SECONDS:
            self._said = tenths
            self._say(f"preparing {self._count:,} pictures: {10 * tenths}%")


class Room:
    """What a picture of `files` may take, within a budget that this process and its callers share, if there is one."""

    def __init__(self, files: Sequence[Path], fit: Fit, budget: int | None, caller_bytes: int) -> None:
        self._files, self._fit, self._budget = files, fit, budget
        self._others = caller_bytes + own_peak_rss() + _SPARE_BYTES
        self.most_bytes = None if budget is None else max(0, budget - self._others)

    def check(self, beside: int = 0) -> None:
        """Raises BudgetInfeasibleError where a picture takes more, naming the one that takes most.

        `beside`: what another process holds that will have to decode them, as nothing can be kept. A damaged file takes
        nothing: decoding it says so.
        """
        largest = (0, Path())
        for path in self._files if self.most_bytes is not None else ():
            with contextlib.suppress(DataError):
                largest = max(largest, (decode_bytes(path, self._fit), path))
        takes, path = largest
        if self._budget is None or self.most_bytes is None or takes + beside <= self.most_bytes:
            return
        (width, height), others = size_of(path, self._fit), self._others + beside
        needed = -(-(others + takes) // 1_000_000) * 1_000_000
        kept = f"; or let {shown(prepared_dir())} be written, where pictures are kept" if beside else ""
        raise BudgetInfeasibleError(
            f"nothing fits the budget of {format_size(self._budget)}: decoding {shown(path)} ({width}x{height} pixels) "
            f"takes {format_size(takes)}, beside {format_size(others)} of the processes that do it",
            budget_bytes=self._budget,
            smallest_feasible_budget_bytes=needed,
            hint=f"the smallest feasible budget is {needed // 1_000_000}MB or more; or scale that picture down{kept}",
        )


def prepare(request: dict[str, Any]) -> dict[str, Any]:
    """Decode what was not decoded before. The request has `fit`, and `data` or `files`.

    `data` names a dataset, of `task` where that is there; `files` are paths. `budget_bytes` (or None) and
    `caller_bytes` bound a picture, and `holder_bytes` too where the cache folder cannot be written: a process that
    holds so much will ask again then.
    `output` is a descriptor to write `files` to instead of the cache folder; `tell` asks for progress.
    The answer says whether it was `stored` in the cache folder, and the `peak_bytes` of this process and its callers.
    Raises DataError, StorageError, BudgetInfeasibleError.
    """
    tune("glibc")
    fit = Fit(**request["fit"])
    if request.get("data") is not None:
        pictures = pictures_named(request["data"], task=request.get("task", AUTO))
        # of one class nothing can be learnt: whoever goes on says so, and need not wait for it
        can_learn = len(pictures.class_names) > 1 or pictures.task != CLASSES
        splits = pictures.splits.values() if can_learn else ()
        lists = [[path for path, _ in split] for split in splits]
    else:
        lists = [[Path(path) for path in request["files"]]]
    keys = [key_of(files, fit) for files in lists]
    wanted = [(files, key) for files, key in zip(lists, keys, strict=True) if not is_there(key, len(files), fit)]
    every = [path for files, _ in wanted for path in files]
    progress = Progress(len(every), tell if request.get("tell") else None)
    room = Room(every, fit, request.get("budget_bytes"), request.get("caller_bytes", 0))
    stored = True
    for files, key in wanted:
        if request.get("output") is not None:
            stored = False
            _write(request["output"], files, fit, _decoded(files, fit, room, progress))
            continue
        try:
            store(key, _decoded(files, fit, room, progress), len(files), fit, keys)
        except OSError:  # no place there; what is wrong with a picture is a DataError
            stored = False
            room.check(request.get("holder_bytes", 0))
    return {"stored": stored, "peak_bytes": own_peak_rss() + request.get("caller_bytes", 0)}


def _decoded(files: Sequence[Path], fit: Fit, room: Room, progress: Progress) -> Iterator[bytes]:
    for path in files:
        try:
            record, takes = decode_within(path, fit, room.most_bytes)
        except TooLargeError:
            room.check()
            raise
        if takes > _LARGE_BYTES:
            release_memory()
        yield record
        progress.step()


def _write(descriptor: int, files: Sequence[Path], fit: Fit, records: Iterator[bytes]) -> None:
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.writelines(records)
    except OSError as error:
        raise StorageError(
            f"cannot write the {len(files) * fit.record_bytes} bytes of the pictures: {error.strerror}",
            hint="free some space in the temporary folder or in the user's cache folder, or lower the image size",
        ) from error


if __name__ == "__main__":
    raise SystemExit(answer(prepare))
