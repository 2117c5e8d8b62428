"""Datasets by name: `load_data("digits")` gives train, validation and test sets, ready to be read in batches."""

import re
from pathlib import Path

from ondevice_trgl.data import synthetic
from ondevice_trgl.data.assemble import assemble, assemble_user
from ondevice_trgl.data.bundle import Asked
from ondevice_trgl.data.bundle import DataBundle as DataBundle
from ondevice_trgl.data.folders import image_folder
from ondevice_trgl.data.idx import fashion_mnist
from ondevice_trgl.data.images import ImageSet as ImageSet
from ondevice_trgl.data.packaged import digits, mnist5k
from ondevice_trgl.data.source import Source
from ondevice_trgl.data.user import call_named
from ondevice_trgl.data.vision import KNOWN as VISION
from ondevice_trgl.data.vision import vision_dataset
from ondevice_trgl.errors import DataError, UnknownNameError

_NAMES = ("digits", "mnist5k", "fashion-mnist", *VISION)
_FORMS = ("folder:PATH", synthetic.FORM, "pkg.module:callable")
_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def data_names() -> list[str]:
    """The named datasets. Beside them there are `folder:PATH`, `synthetic:CxHxW:CLASSES:N`, `pkg.module:callable`."""
    return list(_NAMES)


def load_data(
    name: str,
    *,
    root: Path | None = None,
    image_size: int | None = None,
    train_limit: int | None = None,
    channels: int | None = None,
    seed: int = 0,
    scratch_dir: Path | None = None,
    download: bool = False,
) -> DataBundle:
    """Find, split and prepare the dataset `name`.

    `root` is searched first, then $ONDEVICE_TRGL_DATA, then the user's cache folder. `image_size` resizes to a square
    (None: as it comes; `folder:` has a default), `channels` repeats a single channel, `train_limit` keeps that many
    training samples, evenly over the classes, and a fifth as many (at least 100) for validation. `seed` decides which
    samples are carved off for validation and test, where the dataset has no such parts of its own, and makes
    `synthetic:` images. Records of more than 8 MB go to an unnamed file in `scratch_dir` (None: the system's temporary
    folder, which may be RAM). The network is used only with `download`, and only by the torchvision datasets.

    Raises UnknownNameError for a name that does not exist, DataError for data that is absent, empty or malformed,
    StorageError where the records cannot be written.
    """
    for what, value in (("image_size", image_size), ("train_limit", train_limit), ("channels", channels)):
        if value is not None and value < 1:
            raise DataError(f"{what} is {value}; expected a whole number of at least 1")
    asked = Asked(name, image_size, train_limit, channels, seed, scratch_dir)
    source = _source(asked, root, download)
    return assemble(source, asked) if source is not None else assemble_user(call_named(name), asked)


def _source(asked: Asked, root: Path | None, download: bool) -> Source | None:
    """The dataset as found; None where the name is a callable of the caller's."""
    name = asked.name
    kind, colon, rest = name.partition(":")
    if name == "digits":
        return digits()
    if name == "mnist5k":
        return mnist5k(root)
    if name == "fashion-mnist":
        return fashion_mnist(root)
    if name in VISION:
        return vision_dataset(name, root, download=download, scratch_dir=asked.scratch_dir)
    if kind == "synthetic":
        return synthetic.synthetic(name, asked.seed)
    if kind == "folder":
        if not rest:
            raise DataError(f"{name!r} names no folder; expected folder:PATH", hint="for example folder:pictures/birds")
        return image_folder(Path(rest).expanduser(), asked.image_size)
    if colon and _CALLABLE.fullmatch(name):
        return None
    raise UnknownNameError("dataset", name, [*_NAMES, *_FORMS])
