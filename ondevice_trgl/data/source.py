"""What a reader of a dataset hands to the registry: labels at once, images as a stream.

Imports no torch: the process that prepares pictures has the folders from here.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ondevice_trgl.data.records import Records

from ondevice_trgl.data.preprocessing import NONE
from ondevice_trgl.tasks import CLASSES

DATA_DIR_VARIABLE = "ONDEVICE_TRGL_DATA"


@dataclass(frozen=True)
class Part:
    """One official part of a dataset. `labels` int64 (N,), or targets float32 (N, T).

    `stream()` gives its N records in order, as chunks of uint8 (n, C*H*W); a chunk may be overwritten by the next one.
    Where they lie in a file already, `records()` reads them there, by their position.
    """

    labels: "Tensor"
    stream: Callable[[], "Iterable[Tensor]"]
    records: "Callable[[], Records] | None" = None


@dataclass(frozen=True)
class Source:
    """A dataset before splitting. A part that is None is carved out of train, `val_count` and `test_count` strong
    (None: a tenth). Validation and test are opened when train has been kept, to hold one part at a time.
    """

    origin: str
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    train: Part
    val: Callable[[], Part] | None = None
    test: Callable[[], Part] | None = None
    val_count: int | None = None
    test_count: int | None = None
    resize: str = NONE
    """What was done to bring its pictures to `shape`; see Preprocessing."""
    orientation: str = "exif"
    task: str = CLASSES
    """What the labels are; `class_names` are those of the targets where they are no classes."""


def data_dirs(root: Path | None) -> Iterator[tuple[Path, str]]:
    """The folders where dataset files are looked for, in order, each with the way to name it in a message."""
    if root is not None:
        yield root, str(root)
    if os.environ.get(DATA_DIR_VARIABLE):
        yield Path(os.environ[DATA_DIR_VARIABLE]), f"${DATA_DIR_VARIABLE} = {os.environ[DATA_DIR_VARIABLE]}"
    yield cache_dir(), str(cache_dir())


def cache_dir() -> Path:
    """The user's own folder for datasets, usually ~/.cache/ondevice_trgl."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "ondevice_trgl"
