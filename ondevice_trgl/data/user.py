"""Datasets that callers bring: named as `pkg.module:callable`, or handed over as they are."""

import contextlib
import hashlib
import importlib
import random
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.data.classes import check_names, stated_classes
from ondevice_trgl.data.images import ImageSet
from ondevice_trgl.data.samples import Samples, extremes, is_whole
from ondevice_trgl.data.splits import check_labels, check_task
from ondevice_trgl.data.targets import Label, Targets, together
from ondevice_trgl.errors import DataError
from ondevice_trgl.imported import found_here
from ondevice_trgl.tasks import CLASSES

_PROBES = 16
_CALLABLE = re.compile(r"(?!folder:|synthetic:)[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class UserSet(ImageSet):
    """A map-style dataset of (tensor, label or targets), read sample by sample.

    `positions` (int64) picks of `samples`, which are of one shape; `labels` are the labels at those. Inputs are
    delivered as float32 and otherwise as they come: bytes become 0..1, nothing is normalised. `shape` may differ from
    that of the samples in height and width (bilinear) and repeat a single channel. Whole numbers are delivered as they
    are where int64 is asked for. Reading raises DataError, also for a label that is not in 0..num_classes-1.
    """

    def __init__(
        self,
        samples: Samples,
        labels: Tensor,
        positions: Tensor,
        *,
        shape: tuple[int, ...],
        num_classes: int,
        whole: tuple[int, int] | None = None,
        constant: float | None = None,
    ) -> None:
        super().__init__(labels, shape)
        self.whole = whole if shape == samples.shape else None
        self.constant = constant
        self.task = samples.targets.kind
        self._samples, self._positions, self._num_classes = samples, positions.tolist(), num_classes

    def _fill(self, indices: list[int], out: Tensor) -> Tensor:
        labels: list[Label] = []
        for row, index in enumerate(indices):
            position = self._positions[index]
            value, label = self._samples.read(position, out.dtype)
            if isinstance(label, int) and not 0 <= label < self._num_classes:
                raise DataError(
                    f"the label of sample {position} of {self._samples.name} is {label};"
                    f" expected 0..{self._num_classes - 1}",
                    hint="a label must be the same each time that its sample is read",
                )
            if value.shape[1:] != self.shape[1:]:
                value = interpolate(value[None], size=self.shape[1:], mode="bilinear", align_corners=False)[0]
            out[row].copy_(value)
            labels.append(label)
        return together(labels)


class Scanned(NamedTuple):
    """What one pass over a dataset shows."""

    labels: Tensor
    """int64 (N,), or of targets float32 (N, T)"""
    whole: tuple[int, int] | None
    """Lowest and highest number in the inputs, where all are whole."""
    constant: float | None
    """What every number in every input is, where they are all the same."""


def scan(samples: Samples) -> Scanned:
    """Labels and kind of the inputs, in one pass over every sample.

    Raises DataError where one is malformed, or not of the shape of the others, and where the task is to be told from
    the labels and cannot be.
    """
    gathered = samples.targets.gathered()  # one by one: how many there are is known when they have been read
    lowest, highest, whole = 0, 0, True
    constant: float | None = None
    for position in range(samples.count):
        value, label = samples.given(position)
        gathered.add(label)
        whole = whole and is_whole(value)
        if whole:
            least, most = extremes(value)
            lowest, highest = min(lowest, least), max(highest, most)
        if position == 0:
            constant = float(value.flatten()[0])
        if constant is not None and not bool((value == constant).all()):
            constant = None
    samples.check_count()
    labels = gathered.tensor()
    samples.targets.settle(labels, samples.name)
    return Scanned(labels, (lowest, highest) if whole else None, constant)


def image_set(
    dataset: Any,
    *,
    name: str = "dataset",
    num_classes: int | None = None,
    task: str = CLASSES,
    width: int | None = None,
) -> ImageSet:
    """`dataset` itself where it is an ImageSet, else all of it as a UserSet, after one pass over its samples.

    `num_classes` None: what the dataset states, else its highest label + 1. Labels are read as `task` says, which may
    be auto; of targets there are `width` a sample, or as many as in the first. Raises DataError as `scan` does, and
    where a label is out of range, or an ImageSet is of another task.
    """
    if isinstance(dataset, ImageSet):
        check_task(dataset.task, task, name)
        return dataset
    samples = Samples(dataset, name=name, targets=Targets(task, width))
    labels, whole, constant = scan(samples)
    names = stated_classes(dataset, name=name)
    if samples.targets.width is not None:
        num_classes = samples.targets.width
        check_names(names, num_classes, name)
    elif num_classes is None:
        num_classes = len(names) if names is not None else int(labels.max()) + 1
    check_labels(labels, num_classes, what=name)
    assert samples.shape is not None
    known = UserSet(
        samples, labels, torch.arange(len(labels)),
        shape=samples.shape, num_classes=num_classes, whole=whole, constant=constant,
    )  # fmt: skip
    known.class_names = names
    return known


def fingerprint(samples: Samples, digest: "hashlib.blake2b") -> None:
    """Add some inputs to `digest`, unless reading them twice gives two answers (random augmentation)."""
    step = max(1, samples.count // _PROBES)
    some = range(0, samples.count, step)[:_PROBES]
    first, second = ([samples.read(position)[0] for position in some] for _ in range(2))
    if all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        for value in first:
            digest.update(bytes_of(value.contiguous()))


def is_callable_name(name: str) -> bool:
    """Whether `name` is of the form `pkg.module:callable`, and no other dataset with a colon."""
    return _CALLABLE.fullmatch(name) is not None


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Global random numbers (torch, random, numpy where it is there) from `seed`; afterwards they go on as before."""
    numbers = getattr(sys.modules.get("numpy"), "random", None)  # 3 MB, where torch alone has numpy
    before, numpys = random.getstate(), numbers.get_state() if numbers is not None else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        if numbers is not None:
            numbers.seed(seed % (1 << 32))
        try:
            yield
        finally:
            random.setstate(before)
            if numbers is not None:
                numbers.set_state(numpys)


def call_named(spec: str, seed: int = 0) -> Any:
    """What the callable named by `pkg.module:callable` returns; the working directory is searched as well.

    What it draws, as `random_split` does, comes from `seed`: it is called in several processes, and means one dataset.
    Raises DataError where it cannot be imported, is not there, is not callable, fails or ends the program.
    """
    module_name, _, attribute = spec.partition(":")
    try:
        with found_here(), _seeded(seed):
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        ends = isinstance(error, SystemExit)
        raise DataError(
            f"{spec!r}: importing {module_name} failed: {type(error).__name__}: {error}",
            hint="what it does as a program belongs under `if __name__ == '__main__':`"
            if ends
            else "pkg.module must be importable from here",
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise DataError(
            f"{spec!r}: {module_name} has no callable {attribute!r}",
            hint="give a function without arguments that returns a dataset or (train, val[, test])",
        )
    try:
        with _seeded(seed):  # again: numpy may have come with the module
            return cast(Callable[[], Any], function)()
    except (Exception, SystemExit) as error:
        raise DataError(f"{spec!r} failed: {type(error).__name__}: {error}") from error
