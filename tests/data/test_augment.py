"""Views of samples: what is done to them, that they are drawn by their key alone, and what is refused."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ondevice_trgl.config import AUGMENTATIONS, TrainConfig
from ondevice_trgl.data.augment import KNOWN, Augmented, colour, crop, flip
from ondevice_trgl.errors import ConfigError, UsageError


class Data:
    """Ten pictures (2, 8, 16) without a zero in them."""

    def __init__(self, shape: tuple[int, ...] = (2, 8, 16)) -> None:
        self.shape, self.labels = shape, torch.arange(10)
        self.values = 1.0 + torch.rand(10, *shape, generator=torch.Generator().manual_seed(1))

    def read(self, indices: Sequence[int], out: Tensor) -> Tensor:
        out[: len(indices)] = self.values[list(indices)]
        return self.labels[list(indices)]


def augmented(*given: Any, data: Data | None = None, **settings: Any) -> Augmented:
    made = Augmented.of(data or Data(), TrainConfig(augment=given, **settings))
    assert made is not None
    return made


def read(of: Augmented, view: int, indices: Sequence[int] = range(10), dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.zeros(len(indices), *of.source.shape, dtype=dtype)
    assert of.view(view).read(indices, out).tolist() == list(indices)
    return out


def noisy(sample: Tensor) -> Tensor:
    return sample + torch.randn(sample.shape) + random.random()


def numbered(sample: Tensor) -> Tensor:
    import numpy as np

    return sample + float(np.random.random())


def wider(sample: Tensor) -> Tensor:
    return torch.cat([sample, sample], -1)


def half(sample: Tensor) -> Tensor:
    return sample.half()


def nothing(sample: Tensor) -> None:
    sample.zero_()


def failing(sample: Tensor) -> Tensor:
    raise ValueError("not today")


def test_the_names_are_those_of_the_settings() -> None:
    assert tuple(KNOWN) == AUGMENTATIONS


def test_nothing_to_do_is_nothing() -> None:
    assert Augmented.of(Data(), TrainConfig()) is None


@pytest.mark.parametrize(
    "given", [("crop", "flip", "colour"), (noisy,), (numbered,)], ids=["names", "noisy", "numbered"]
)
def test_a_view_depends_on_seed_lap_view_and_sample_alone(given: tuple[Any, ...]) -> None:
    of = augmented(*given)
    first = read(of, 1)
    torch.manual_seed(5)
    random.seed(5)
    again = read(augmented(*given), 1, [3, 7])  # in another order, in another batch, behind other draws
    assert torch.equal(again, first[[3, 7]])
    assert torch.equal(read(of, 0), Data().values)
    assert not torch.equal(read(of, 2), first)
    assert not torch.equal(read(augmented(*given, seed=1), 1), first)
    of.lap = 1
    assert not torch.equal(read(of, 1), first)


@pytest.mark.parametrize("given", ["crop", noisy, numbered], ids=["crop", "noisy", "numbered"])
def test_no_global_generator_is_touched(given: Any) -> None:
    import numpy as np

    def state() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = state()
    read(augmented(given), 1)
    assert state() == before


def test_a_function_that_loads_numpy_as_it_is_called_draws_the_same(run_python: Callable[..., str]) -> None:
    source = (
        "import sys\n"
        "from tests.data.test_augment import augmented, numbered, read\n"
        "names = [name for name in sys.modules if name.split('.')[0] == 'numpy'] or __import__('numpy') and ['numpy']\n"
        "hidden = {name: sys.modules.pop(name) for name in names}\n"
        "def own(sample):\n"
        "    sys.modules.update(hidden)\n"
        "    return numbered(sample)\n"
        "of = augmented(own)\n"
        "print(read(of, 1, [0]).sum().item(), read(of, 1, [0]).sum().item())"
    )
    first, again = run_python(source).split()
    assert first == again


def test_crop_moves_by_an_eighth_at_most_and_fills_with_zeros() -> None:
    picture = Data().values[0]
    for down, right in ((0.0, 0.0), (0.5, 0.5), (0.99, 0.99), (0.99, 0.0)):
        sample, numbers = picture.clone(), iter((down, right))
        crop(sample, lambda numbers=numbers: next(numbers))  # type: ignore[misc]
        dy, dx = (int(u * (2 * most + 1)) - most for u, most in ((down, 1), (right, 2)))
        padded = torch.nn.functional.pad(picture, (2, 2, 1, 1))
        assert torch.equal(sample, padded[:, 1 - dy : 9 - dy, 2 - dx : 18 - dx])
    tiny = torch.ones(1, 1, 1)
    crop(tiny, lambda: 0.9)
    assert tiny.item() == 1.0


def test_flip_mirrors_every_other_time() -> None:
    picture = Data().values[0]
    for drawn, expected in ((0.2, picture.flip(-1)), (0.7, picture)):
        sample = picture.clone()
        flip(sample, lambda drawn=drawn: drawn)  # type: ignore[misc]
        assert torch.equal(sample, expected)


def test_colour_changes_contrast_around_the_mean_and_brightness() -> None:
    picture = Data().values[0]
    sample, numbers = picture.clone(), iter((1.0, 0.5))
    colour(sample, lambda: next(numbers))
    assert torch.allclose(sample, picture.mean() + 1.2 * (picture - picture.mean()), atol=1e-6)
    sample, numbers = picture.clone(), iter((0.5, 1.0))
    colour(sample, lambda: next(numbers))
    assert torch.allclose(sample, picture + 0.2 * picture.std(correction=0), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (wider, "wider returned torch.float32 .2, 8, 32. for a sample that is torch.float32 .2, 8, 16."),
        (half, "half returned torch.float16"),
        (nothing, "nothing returned NoneType"),
        (failing, "failing raised ValueError: not today"),
    ],
    ids=["wider", "half", "nothing", "failing"],
)
def test_what_a_function_may_not_do(given: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        augmented(given).try_out(torch.float32)


def test_want_of_memory_is_no_fault_of_the_function() -> None:
    def hungry(sample: Tensor) -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        augmented(hungry).try_out(torch.float32)


def test_pictures_are_asked_for() -> None:
    with pytest.raises(UsageError, match=r"augment 'flip' is of pictures .*torch.float32 \(16,\)"):
        augmented("flip", data=Data((16,))).try_out(torch.float32)
    with pytest.raises(UsageError, match=r"torch\.int64"):
        augmented("crop").try_out(torch.int64)
    augmented(noisy, data=Data((16,))).try_out(torch.float32)


def test_a_function_by_name() -> None:
    by_name = augmented("tests.data.test_augment:noisy")
    assert torch.equal(read(by_name, 1), read(augmented(noisy), 1))
    with pytest.raises(UsageError, match="cannot be imported"):
        augmented("tests.data.test_augment:none_such")


def test_the_order_is_as_given() -> None:
    def double(sample: Tensor) -> Tensor:
        return sample * 2

    def more(sample: Tensor) -> Tensor:
        return sample + 1

    assert torch.equal(read(augmented(double, more), 1), Data().values * 2 + 1)
    assert torch.equal(read(augmented(more, double), 1), (Data().values + 1) * 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"augment": ("flop",)}, r"expected any of crop, flip, colour \(did you mean 'flip'\?\).*not 'flop'"),
        ({"augment": ("crop", 3)}, "not 3"),
        ({"augment": "crop,,flip"}, "not ''"),
        ({"augment": 7}, "augment = 7"),
        ({"views": 2}, "views = 2: without augment all of them would be the same"),
        ({"augment": ("crop",), "views": 0}, "views = 0"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**settings)


def test_settings() -> None:
    assert TrainConfig().view_count == 1
    text: dict[str, Any] = {"augment": "crop,flip"}
    assert TrainConfig(**text).augment == ("crop", "flip")
    assert TrainConfig(augment=["crop"]).view_count == 4  # type: ignore[arg-type]
    assert TrainConfig(augment=("crop",), views=2).view_count == 2
    own = TrainConfig(augment=noisy)  # type: ignore[arg-type]
    assert own.to_dict()["augment"] == ["tests.data.test_augment:noisy"]
    assert TrainConfig(**TrainConfig(augment=("flip",)).to_dict()) == TrainConfig(augment=("flip",))
