"""From a dataset as it was found to three sets: what cannot be trained on is refused."""

import pytest
import torch
from torch import Tensor

from ondevice_trgl.data.assemble import assemble
from ondevice_trgl.data.bundle import Asked
from ondevice_trgl.data.source import Part, Source
from ondevice_trgl.errors import DataError


def coloured(*colours: Tensor) -> Source:
    """40 pictures of 2x2 pixels in two classes; each of one colour (3,), in turn."""
    pixels = torch.stack(colours).to(torch.uint8)[torch.arange(40) % len(colours)].repeat_interleave(4, dim=1)
    return Source(
        origin="colours",
        shape=(3, 2, 2),
        class_names=("a", "b"),
        train=Part(torch.arange(40) // 20, lambda: [pixels]),
    )


@pytest.mark.parametrize(("colour", "level"), [((0, 0, 0), "0"), ((255, 0, 7), "255, 0, 7")])
def test_training_pictures_of_one_colour_are_refused(colour: tuple[int, ...], level: str) -> None:
    with pytest.raises(DataError) as caught:
        assemble(coloured(torch.tensor(colour)), Asked("flags"))
    assert caught.value.message == (
        f"every pixel of the 32 training samples of flags is {level}: there is nothing to learn from"
    )
    assert caught.value.hint.startswith("look at what they are made from")


def test_one_channel_that_varies_is_enough() -> None:
    data = assemble(coloured(torch.tensor([255, 0, 7]), torch.tensor([255, 9, 7])), Asked("flags"))
    image, _ = data.train[0]
    assert image[[0, 2]].abs().max() == 0
    assert image[1].abs().min() > 0.9


def test_a_single_colour_in_what_is_put_aside_is_fine() -> None:
    from_train = coloured(torch.tensor([0, 0, 0]), torch.tensor([9, 9, 9]))
    grey = coloured(torch.tensor([9, 9, 9])).train
    source = Source("colours", (3, 2, 2), ("a", "b"), from_train.train, val=lambda: grey, test=lambda: grey)
    assert len(assemble(source, Asked("flags")).val) == 40
