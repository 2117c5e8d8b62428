"""The power fails at every instant of a run: from whatever the disk may then hold, the run ends with the same bytes.

What is done to the files of a run is recorded: at each fsync, rename, link, removal and new folder the names in every
folder and the bytes of every file. A disk that loses its power may keep, of each folder by itself, the names of any
instant since that folder was last flushed; and of each file the bytes of its last flush, or what was written since
cut short, as zeros, or not at all. Such states are drawn by seed behind every operation, laid out in a folder, and
resumed (or started again, where there is no run yet).

    python benchmarks/power_cut.py [--states 400] [--schedule sequential|multi-lap|parallel] [--seed 0]
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ondevice_trgl import TrainConfig, Trainer

RESULTS = Path(__file__).resolve().parent / "results" / "power_cut.json"
SCHEDULES: dict[str, dict[str, Any]] = {
    "sequential": {},
    "multi-lap": {"schedule": "multi-lap", "laps": 2},
    "parallel": {"schedule": "parallel"},
}
Names = dict[str, int]
"""In one folder: what lies there by name, a number for each file; -1 for a folder."""


@dataclass
class Flushed:
    """What a disk has for certain of a file, and what may be on it besides."""

    certain: bytes | None
    written: bytes


class Recorder:
    """The folder `root`, and all in it, as it was behind each operation that a disk may or may not have done."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.instants: list[tuple[dict[str, list[Names]], dict[int, Flushed]]] = []
        """Behind each operation: of every folder the names since it was flushed, oldest first; and the files."""
        self._names: dict[str, list[Names]] = {}
        self._files: dict[int, Flushed] = {}
        self._numbers: dict[int, int] = {}
        self._look()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Whatever this process does to files meanwhile."""
        names = ("fsync", "fdatasync", "replace", "rename", "unlink", "remove", "link", "mkdir", "rmdir")
        before = {name: getattr(os, name) for name in names}
        for name, function in before.items():
            setattr(os, name, self._seen(function))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(os, name, function)

    def _seen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._look()
            result = function(*args, **kwargs)
            self._look()
            if "sync" in function.__name__:
                self._flushed(args[0])
            self._note()
            return result

        return call

    def _look(self) -> None:
        """Names and bytes as they are, flushed or not."""
        seen: dict[str, Names] = {}
        alive = set()
        for folder, folders, files in os.walk(self.root):
            seen[os.path.relpath(folder, self.root)] = dict.fromkeys(folders, -1)
            for name in files:
                path = Path(folder, name)
                try:
                    inode, data = path.stat().st_ino, path.read_bytes()
                except OSError:
                    continue
                number = self._numbers.setdefault(inode, len(self._files))
                alive.add(inode)
                known = self._files.get(number)
                self._files[number] = Flushed(known.certain if known else None, data)
                seen[os.path.relpath(folder, self.root)][name] = number
        for inode in self._numbers.keys() - alive:
            del self._numbers[inode]  # the next file of that number is another
        for folder, names in seen.items():
            history = self._names.setdefault(folder, [{}])
            if history[-1] != names:
                history.append(names)
        for folder in self._names.keys() - seen.keys():
            del self._names[folder]

    def _flushed(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            folder = os.path.relpath(Path(f"/proc/self/fd/{descriptor}").readlink(), self.root)
            if folder in self._names:
                self._names[folder] = self._names[folder][-1:]
        elif (number := self._numbers.get(status.st_ino)) is not None:
            self._files[number] = Flushed(self._files[number].written, self._files[number].written)

    def _note(self) -> None:
        names = {folder: list(history) for folder, history in self._names.items()}
        self.instants.append((names, {number: Flushed(**vars(file)) for number, file in self._files.items()}))

    def lay_out(self, instant: int, target: Path, draw: random.Random) -> None:
        """Make `target` what a disk may hold that lost its power behind that operation."""
        names, files = self.instants[instant]
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        self._lay_out(".", target, names, files, draw)

    def _lay_out(
        self, folder: str, target: Path, names: dict[str, list[Names]], files: dict[int, Flushed], draw: random.Random
    ) -> None:
        history = names.get(folder, [{}])
        chosen = draw.choice([history[0], history[-1], draw.choice(history)])
        for name, number in chosen.items():
            if number < 0:
                (target / name).mkdir()
                self._lay_out(os.path.normpath(f"{folder}/{name}"), target / name, names, files, draw)
            else:
                (target / name).write_bytes(_on_disk(files[number], draw))


def _on_disk(file: Flushed, draw: random.Random) -> bytes:
    if file.certain == file.written:
        return file.written
    certain, written = file.certain or b"", file.written
    begun = len(written) // 2
    return draw.choice(
        [certain, written, written[:begun], bytes(len(written)), written[:begun] + bytes(len(written) - begun)]
    )


class Residual(nn.Module):
    """x + f(x), of six channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


def network() -> nn.Module:
    torch.manual_seed(0)
    parts = nn.Conv2d(1, 6, 3, padding=1), Residual(), nn.Dropout(0.1), Residual()
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def samples(count: int, seed: int) -> TensorDataset:
    images = torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(images, torch.arange(count) % 3)


def trained(run: Path, *, resume: bool, make: Callable[..., Any], **settings: Any) -> None:
    """The run in `run`, to its end."""
    config = TrainConfig(
        budget="2GB", modules=2, epochs=1, classifier_epochs=1, batch_size=8, threads=1, checkpoint_every="2steps",
        enforce=False, **settings,
    )  # fmt: skip
    trainer = make(network(), config, run_dir=run, force=True)
    report = trainer.fit(samples(26, 1), samples(9, 2), resume=resume)
    assert report.status == "completed"


def tried(schedule: str, states: int, seed: int, make: Callable[..., Any], folder: Path) -> dict[str, int]:
    """`states` states of a disk, each gone on with. Raises AssertionError where one ends with other bytes."""
    place = folder / "recorded"
    place.mkdir()
    recorder, settings = Recorder(place), SCHEDULES[schedule]
    with recorder.recording():
        trained(place / "run", resume=False, make=make, **settings)
    weights = (place / "run" / "model.safetensors").read_bytes()
    draw = random.Random(f"{schedule} {seed}")
    counts = {"operations": len(recorder.instants), "resumed": 0, "started again": 0}
    for number in range(states):
        instant = number * len(recorder.instants) // states
        after = folder / "after"
        recorder.lay_out(instant, after, draw)
        run = after / "run"
        begun = (run / "config.json").is_file()
        try:
            trained(run, resume=begun, make=make, **settings)
        except Exception as error:
            error.add_note(f"state {number} of {states}, behind operation {instant}, seed {seed}, laid out in {after}")
            raise
        assert (run / "model.safetensors").read_bytes() == weights, f"other weights: state {number}, seed {seed}"
        left = sorted(path.name for path in run.rglob("*") if path.name.endswith((".pending", ".before")))
        assert not left, f"left behind: {left}, state {number}, seed {seed}"
        counts["resumed" if begun else "started again"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=400)
    parser.add_argument("--schedule", choices=SCHEDULES)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for schedule in [asked.schedule] if asked.schedule else SCHEDULES:
        with tempfile.TemporaryDirectory(prefix="trgl-power-") as folder:
            found = tried(schedule, asked.states, asked.seed, Trainer, Path(folder))
        known[schedule] = {"states": asked.states, "seed": asked.seed, **found}
        print(schedule, json.dumps(known[schedule]), file=sys.stderr, flush=True)
        RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
