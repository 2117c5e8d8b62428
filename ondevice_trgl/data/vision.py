"""CIFAR-10, CIFAR-100 and STL-10 through torchvision, unpacked by a process of their own.

torchvision unpickles a whole dataset at once (CIFAR-100: several hundred MB) and costs memory to import. Here a child
process does that, writes plain records to a file, and is gone before training starts.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.data.records import fill, open_scratch, stream_file
from ondevice_trgl.data.source import Part, Source, cache_dir, data_dirs
from ondevice_trgl.errors import DataError

CHILD = (sys.executable, "-m", "ondevice_trgl.data.vision_child")


@dataclass(frozen=True)
class _Known:
    title: str
    folder: str
    shape: tuple[int, int, int]


KNOWN = {
    "cifar10": _Known("CIFAR-10", "cifar-10-batches-py", (3, 32, 32)),
    "cifar100": _Known("CIFAR-100", "cifar-100-python", (3, 32, 32)),
    "stl10": _Known("STL-10", "stl10_binary", (3, 96, 96)),
}


def vision_dataset(name: str, root: Path | None, *, download: bool, scratch_dir: Path | None) -> Source:
    """One of KNOWN, from the first folder that has it unpacked; the network is used only with `download`.

    Raises DataError where it is not on disk or torchvision rejects it, UsageError where torchvision is absent.
    """
    known = KNOWN[name]
    places = [(place / sub, f"{said}/{sub}" if sub else said) for place, said in data_dirs(root) for sub in ("", name)]
    found = next((place for place, _ in places if (place / known.folder).is_dir()), None)
    if found is None and not download:
        raise DataError(
            f"{name} is not here; looked for the folder {known.folder}\n  in "
            + "\n  in ".join(said for _, said in places),
            hint=f"unpack the {known.title} archive (the python version, for CIFAR) into one of these folders, or let"
            f" it be fetched once: load_data({name!r}, download=True)",
        )
    place = found or root or cache_dir()
    train, classes = _unpack(name, place, "train", known.shape, download=download, scratch_dir=scratch_dir)
    return Source(
        origin=known.title,
        shape=known.shape,
        class_names=classes,
        train=train,
        test=lambda: _unpack(name, place, "test", known.shape, download=False, scratch_dir=scratch_dir)[0],
    )


def _unpack(
    name: str, place: Path, split: str, shape: tuple[int, int, int], *, download: bool, scratch_dir: Path | None
) -> tuple[Part, tuple[str, ...]]:
    """Run the child; its file is one line of JSON, the labels as bytes, then the records."""
    file = open_scratch(scratch_dir)
    order = {"name": name, "root": str(place), "split": split, "download": download, "output": file.fileno()}
    try:
        done = subprocess.run(
            [*CHILD, json.dumps(order)],
            pass_fds=[file.fileno()],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            check=False,
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
            raise DataError(
                f"{name} in {place} could not be read: {said[-1]}",
                hint="if the files are damaged, remove them and fetch them again",
            )
        file.seek(0)
        line = _first_line(file)
        header = json.loads(line)
        labels = torch.empty(header["count"], dtype=torch.uint8)
        fill(file, bytes_of(labels))
    except BaseException:
        file.close()
        raise

    def stream() -> Iterator[Tensor]:
        with file:
            file.seek(len(line) + len(labels))
            yield from stream_file(file, len(labels), shape[0] * shape[1] * shape[2], what=f"{name} ({split})")

    return Part(labels.long(), stream), tuple(header["classes"])


def _first_line(file: BinaryIO) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n") and (byte := file.read(1)):
        line += byte
    return bytes(line)
