"""Views of training samples: each changed a little, by a seed, a lap, the number of the view and its own number alone.

View 0 is the sample as it is. What is drawn comes from generators of our own, and the global ones, which functions of
the user's may draw from, are put back: a run that is resumed sees the same views bit for bit.
"""

import contextlib
import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.limit import lacks_memory
from ondevice_trgl.errors import UsageError, first_line
from ondevice_trgl.imported import function_named, name_of

Draw = Callable[[], float]
"""A number from 0 to 1 (exclusive), another each time."""


class Readable(Protocol):
    """Samples of `shape` with their labels, read by number; see `run.batches.Source`."""

    labels: Tensor
    shape: tuple[int, ...]

    def read(self, indices: Sequence[int], out: Tensor) -> Tensor: ...


def crop(sample: Tensor, draw: Draw) -> None:
    """Pad a picture (C, H, W) with zeros by an eighth of its sides, and cut one of its size out of that."""
    height, width = sample.shape[-2:]
    down, right = (_shift(side, draw) for side in (height, width))
    moved = torch.zeros_like(sample)
    rows, columns = height - abs(down), width - abs(right)
    part = sample[..., max(0, -down) :, max(0, -right) :][..., :rows, :columns]
    moved[..., max(0, down) :, max(0, right) :][..., :rows, :columns] = part
    sample.copy_(moved)


def _shift(side: int, draw: Draw) -> int:
    most = min(max(1, side // 8), side - 1)
    return int(draw() * (2 * most + 1)) - most


def flip(sample: Tensor, draw: Draw) -> None:
    """Mirror a picture (C, H, W) left to right, every other time."""
    if draw() < 0.5:
        sample.copy_(sample.flip(-1))


def colour(sample: Tensor, draw: Draw) -> None:
    """Contrast of a picture (C, H, W) times 0.8 to 1.2 around its mean, brightness up or down by 0.2 of its spread."""
    mean, spread = sample.mean(), sample.std(correction=0)
    contrast, brightness = 0.8 + 0.4 * draw(), 0.4 * draw() - 0.2
    sample.sub_(mean).mul_(contrast).add_(mean + brightness * spread)


KNOWN: Mapping[str, Callable[[Tensor, Draw], None]] = {"crop": crop, "flip": flip, "colour": colour}


class Augmented:
    """Views of the training samples `source`, as `config` has them; `lap` is that which they are drawn for.

    Raises UsageError where a function of the user's cannot be found. Memory: one sample while one is changed.
    """

    def __init__(self, source: Readable, config: TrainConfig) -> None:
        self.source, self.seed, self.count, self.lap = source, config.seed, config.view_count, 0
        self.steps: list[tuple[str, Callable[..., Any]]] = []
        for given in config.augment or ():
            known = KNOWN.get(given) if isinstance(given, str) else None
            own = function_named(given, "augmentation", "sample") if isinstance(given, str) and not known else given
            self.steps.append((name_of(given), known or own))  # type: ignore[arg-type]

    @classmethod
    def of(cls, source: Readable, config: TrainConfig) -> "Augmented | None":
        """None where nothing is to be changed."""
        return cls(source, config) if config.augment else None

    def view(self, number: int) -> "View":
        """View `number`, any from 0 on, of all samples."""
        return View(self, number)

    def try_out(self, dtype: torch.dtype) -> None:
        """Change one sample, read as `dtype`. Raises UsageError where that is no picture, or a function fails."""
        shape = self.source.shape
        for name, _ in self.steps:
            if name in KNOWN and (len(shape) != 3 or not dtype.is_floating_point):
                raise UsageError(
                    f"augment {name!r} is of pictures (C, H, W), and samples here are {dtype} {tuple(shape)}",
                    hint="leave it out, or give a function of your own as pkg.module:callable",
                )
        self.view(1).read([0], torch.zeros(1, *shape, dtype=dtype))

    def generators_kept(self) -> contextlib.AbstractContextManager[None]:
        """Around calls of `change`: functions of the user's draw from the global generators."""
        return contextlib.nullcontext() if all(name in KNOWN for name, _ in self.steps) else _generators_kept()

    @torch.no_grad()
    def change(self, sample: Tensor, view: int, index: int) -> None:
        """Make view `view` of sample `index`, which `sample` holds, in place."""
        key = hashlib.blake2b(f"{self.seed} {self.lap} {view} {index}".encode(), digest_size=8).digest()
        seed = int.from_bytes(key, "little") >> 1
        draw = random.Random(seed).random
        for number, (name, function) in enumerate(self.steps):
            if name in KNOWN:
                function(sample, draw)
            else:
                sample.copy_(_drawn(name, function, sample, seed + number))


class View:
    """One view of every sample, as a source of batches."""

    def __init__(self, of: Augmented, number: int) -> None:
        self._of, self._number = of, number
        self.labels, self.shape = of.source.labels, of.source.shape

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Sequence[int], out: Tensor) -> Tensor:
        """Fill out[:len(indices)]; returns their labels. Raises UsageError where a function of the user's fails."""
        labels = self._of.source.read(indices, out)
        if self._number:
            with self._of.generators_kept():
                for sample, index in zip(out, indices, strict=False):
                    self._of.change(sample, self._number, int(index))
        return labels


def _drawn(name: str, function: Callable[[Tensor], Any], sample: Tensor, seed: int) -> Tensor:
    """What `function` makes of `sample` where all global generators start from `seed`."""
    had_numpy = _numpy_random() is not None
    _start_from(seed)
    found = _checked(name, function, sample.clone())
    if had_numpy or _numpy_random() is None:
        return found
    _start_from(seed)  # it has loaded numpy, whose generator starts anywhere
    return _checked(name, function, sample.clone())


def _checked(name: str, function: Callable[[Tensor], Any], sample: Tensor) -> Tensor:
    """What `function` makes of `sample`, which has its shape and dtype."""
    shape, dtype = tuple(sample.shape), sample.dtype
    try:
        found = function(sample)
    except Exception as error:  # whatever the user's function does
        if lacks_memory(error):
            raise  # which is the budget's affair: the step is tried again
        raise UsageError(
            f"augmentation {name} raised {type(error).__name__}: {first_line(error)}",
            hint=f"it is given one sample, {dtype} {shape}",
        ) from error
    if isinstance(found, Tensor) and tuple(found.shape) == shape and found.dtype == dtype:
        return found
    got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise UsageError(
        f"augmentation {name} returned {got} for a sample that is {dtype} {shape}",
        hint="return a tensor of the same shape and dtype",
    )


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    """Behind it the global generators are as they were; that of numpy, where it is loaded meanwhile, is anywhere."""
    kept, numpy = random.getstate(), _numpy_random()
    before = None if numpy is None else numpy.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(kept)
            if numpy is not None:
                numpy.set_state(before)
            elif (loaded := _numpy_random()) is not None:
                loaded.seed()


def _start_from(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if (numpy := _numpy_random()) is not None:
        numpy.seed(seed % (1 << 32))


def _numpy_random() -> Any:
    return getattr(sys.modules.get("numpy"), "random", None)
