"""Datasets by name: `load_data("digits")` gives train, validation and test sets, ready to be read in batches."""

from collections.abc import Sequence
from pathlib import Path

from ondevice_trgl.data import synthetic
from ondevice_trgl.data.assemble import assemble, assemble_user
from ondevice_trgl.data.bundle import Asked
from ondevice_trgl.data.bundle import DataBundle as DataBundle
from ondevice_trgl.data.folders import Found, found_in, picture_files, picture_source
from ondevice_trgl.data.holdout import FilesToTell, Holdout, as_trained, fit_of, pictures, stats_of, user_holdout
from ondevice_trgl.data.idx import fashion_mnist
from ondevice_trgl.data.images import ImageSet as ImageSet
from ondevice_trgl.data.packaged import digits, mnist5k
from ondevice_trgl.data.pictures import is_pictures, meant, pictures_named
from ondevice_trgl.data.preprocessing import Preprocessing
from ondevice_trgl.data.source import Source
from ondevice_trgl.data.user import call_named, is_callable_name
from ondevice_trgl.data.vision import KNOWN as VISION
from ondevice_trgl.data.vision import vision_dataset
from ondevice_trgl.errors import DataError, UnknownNameError
from ondevice_trgl.tasks import AUTO

_NAMES = ("digits", "mnist5k", "fashion-mnist", *VISION)
_FORMS = ("folder:PATH", "csv:FILE", *synthetic.FORMS, "pkg.module:callable")


def data_names() -> list[str]:
    """The named datasets. Beside them there are `folder:PATH`, `csv:FILE`, `synthetic:CxHxW:CLASSES|regT|multiT:N`,
    `pkg.module:callable`."""
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
    orientation: str = "exif",
    known: Preprocessing | None = None,
    task: str = AUTO,
) -> DataBundle:
    """Find, split and prepare the dataset `name`.

    `root` is searched first, then $ONDEVICE_TRGL_DATA, then the user's cache folder. `image_size` resizes to a square
    (None: as it comes; `folder:` has a default), `channels` repeats a single channel, `train_limit` keeps that many
    training samples, evenly over the classes, and a fifth as many (at least 100) for validation. `seed` decides which
    samples are carved off for validation and test, where the dataset has no such parts of its own, and makes
    `synthetic:` images. Records of more than 8 MB go to an unnamed file in `scratch_dir` (None: the system's temporary
    folder, which may be RAM). The network is used only with `download`, and only by the torchvision datasets. Picture
    files are turned upright as they say, unless `orientation` is stored; what they were decoded to is kept in the
    user's cache folder. Labels are read as `task` says. Pixels are normalised by mean and spread of `known`, or else of
    what is trained on.

    Raises UnknownNameError for a name that does not exist, DataError for data that is absent, empty or malformed,
    StorageError where the records cannot be written.
    """
    for what, value in (("image_size", image_size), ("train_limit", train_limit), ("channels", channels)):
        if value is not None and value < 1:
            raise DataError(f"{what} is {value}; expected a whole number of at least 1")
    asked = Asked(name, image_size, train_limit, channels, seed, scratch_dir, task)
    source = _source(asked, root, download, orientation)
    if source is None:
        return assemble_user(call_named(name, asked.seed), asked)
    return assemble(source, asked, None if known is None else stats_of(known, name))


def load_holdout(
    name: str,
    known: Preprocessing,
    *,
    root: Path | None = None,
    channels: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    scratch_dir: Path | None = None,
    by_order: bool = False,
) -> Holdout:
    """The dataset `name` for a network that was trained on another, whose data were as `known`.

    Pictures in files and the datasets of a callable are measured whole, of those with splits the test split (of files
    that of validation where there is none); a named dataset by its test part. Classes are matched by name, or by their
    order with `by_order`. Memory and errors as `load_data`; DataError too for unknown classes and other shapes.
    """
    asked = Asked(name, image_size, None, channels, seed, scratch_dir, known.task)
    found = _found(asked, known)
    if found is not None:
        samples = pictures(found.part, known, asked)
        return as_trained(samples, found.class_names, found.origin, known, what=name, by_order=by_order)
    source = _source(asked, root, download=False)
    if source is None:
        return user_holdout(call_named(name, asked.seed), known, asked, by_order=by_order)
    bundle = assemble(source, asked, stats_of(known, name))
    origin = f"{source.origin}, test part"
    return as_trained(bundle.test, bundle.class_names, origin, known, what=name, by_order=by_order)


def _found(asked: Asked, known: Preprocessing) -> Found | None:
    """Picture files with their classes; None where the name means other data."""
    if is_pictures(asked.name):
        listed = pictures_named(asked.name, held_out=True, task=asked.task)
        return found_in(listed, fit_of(known, asked.name), scratch_dir=asked.scratch_dir)
    return None


def load_pictures(paths: Sequence[Path], known: Preprocessing, *, scratch_dir: Path | None = None) -> FilesToTell:
    """Picture files, and those in folders, as inputs of a network whose data were as `known`. Raises DataError."""
    what = str(paths[0]) if len(paths) == 1 else f"{len(paths)} paths"
    found = picture_files(paths, fit_of(known, what), scratch_dir=scratch_dir)
    return FilesToTell(found.files, pictures(found.part, known, Asked(what, scratch_dir=scratch_dir)), found.origin)


def _source(asked: Asked, root: Path | None, download: bool, orientation: str = "exif") -> Source | None:
    """The dataset as found; None where the name is a callable of the caller's."""
    name = asked.name
    kind = name.partition(":")[0]
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
    if is_pictures(name):
        listed = pictures_named(name, task=asked.task)
        return picture_source(listed, asked.image_size, orientation, scratch_dir=asked.scratch_dir)
    if is_callable_name(name):
        return None
    raise UnknownNameError("dataset", name, [*_NAMES, *_FORMS], hint=meant(name))
