"""Networks that look ids up: read as whole numbers, planned with ids that are valid, and trained."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from ondevice_trgl import DataError, PartitionError, TrainConfig
from ondevice_trgl.data.user import image_set
from ondevice_trgl.run.inputs import check_ids, traced
from tests.asked_here import Trainer
from tests.run.conftest import CLASSES, At, Fit, config, net, samples

pytestmark = pytest.mark.usefixtures("code_pages_kept")

WORDS, LENGTH = 50, 7


class Text(nn.Module):
    """(B, 7) ids -> (B, 3)."""

    def __init__(self, words: int = WORDS, *, cast: bool = False) -> None:
        super().__init__()
        self.table, self.cast = nn.Embedding(words, 16), cast
        self.mix = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(2)))
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.mix(self.table(x.long() if self.cast else x)).mean(1))
        return out


def words(count: int, seed: int = 0, dtype: torch.dtype = torch.int64) -> TensorDataset:
    """The class is the third that five of the words come from; the last word is the highest id."""
    labels = torch.arange(count) % CLASSES
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 16, (count, LENGTH), generator=generator)
    ids[:, :5] += 16 * labels[:, None]
    ids[0, -1] = WORDS - 1
    return TensorDataset(ids.to(dtype), labels)


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    ids, labels = data.tensors
    with torch.no_grad():
        return float((model.eval()(ids.long()).argmax(1) == labels).double().mean())


@pytest.mark.parametrize(("dtype", "cast"), [(torch.int64, False), (torch.int32, True), (torch.uint8, False)], ids=str)
def test_a_text_classifier_is_planned_and_trained(fit: Fit, dtype: torch.dtype, cast: bool) -> None:
    torch.manual_seed(0)
    model, test = Text(cast=cast), words(60, 2, dtype)
    settings = config(modules=2, epochs=12, batch_size=16, micro_batch=4, optimizer="adamw", lr=0.02)
    trainer = Trainer(model, settings, run_dir=fit.path("run"))
    assert trainer.plan(words(90, dtype=dtype), words(30, 1, dtype)).num_modules == 2
    report = trainer.fit(words(90, dtype=dtype), words(30, 1, dtype), test)
    assert report.modules[1].test_accuracy is not None
    assert report.modules[1].test_accuracy > 0.9
    for head, module in enumerate(report.heads):
        assert accuracy(trainer.export(head), test) == module.test_accuracy


@pytest.mark.parametrize(
    "settings", [{"modules": "auto"}, {"modules": 1, "optimizer": "adamw"}, {"modules": 3, "batch_size": 1}]
)
def test_other_ways_to_train_it(fit: Fit, settings: dict[str, Any]) -> None:
    report = fit("run", model=Text(), train=words(20), val=words(9, 1), test=words(9, 2), **settings)
    assert report.status == "completed"


def test_a_run_can_be_resumed(fit: Fit) -> None:
    torch.manual_seed(0)
    data: dict[str, Any] = {"train": words(20), "val": words(9, 1), "test": words(9, 2)}
    state = Text().state_dict()
    for name, callbacks in (("whole", []), ("parts", [At("on_step_end", 3, lambda run: run.request_pause())])):
        model = Text()
        model.load_state_dict(state)
        report = fit(name, model=model, modules=2, callbacks=callbacks, **data)
    assert report.status == "paused"
    assert fit("parts", model=model, modules=2, resume=True, **data).status == "completed"
    assert fit.weights("whole") == fit.weights("parts")


class Bytes(nn.Module):
    """A table that images have nothing to do with, and one that is called."""

    def __init__(self, *, called: bool) -> None:
        super().__init__()
        self.places, self.called = nn.Embedding(4, 3), called
        self.weight = nn.Parameter(torch.randn(256, 3))
        self.stem, self.classifier = nn.Linear(6, 3), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.called:
            z = functional.embedding(x, self.weight).mean(1)
        else:
            z = self.stem(x) + self.places(torch.arange(1, device=x.device))
        out: Tensor = self.classifier(z)
        return out


@pytest.mark.parametrize(("called", "dtype"), [(True, torch.int64), (False, torch.float32)])
def test_bytes_are_ids_where_they_are_looked_up_and_else_brightness(called: bool, dtype: torch.dtype) -> None:
    source = image_set(TensorDataset(torch.full((6, 6), 200, dtype=torch.uint8), torch.arange(6) % CLASSES))
    chain = traced(Bytes(called=called), source)
    assert chain.in_dtype == dtype
    out = torch.zeros(2, 6, dtype=dtype)
    source.read([0, 1], out)
    assert out[0, 0] == (200 if called else torch.tensor(200 / 255))


def test_whole_numbers_that_are_not_looked_up_are_numbers(fit: Fit) -> None:
    images, labels = samples(26).tensors
    ints = TensorDataset((4 * images).round().long(), labels)
    assert traced(net(), image_set(ints)).in_dtype == torch.float32
    floats = TensorDataset((4 * images).round(), labels)
    for name, train in (("ints", ints), ("floats", floats)):
        fit(name, train=train, modules=2)
    assert fit.weights("ints") == fit.weights("floats")


def test_ids_beyond_the_table(fit: Fit) -> None:
    with pytest.raises(DataError, match="id 49 in the train set is out of range: the network's table has 49 rows"):
        fit("run", model=Text(WORDS - 1), train=words(20), val=None, test=None, modules=2)
    ids, labels = words(20).tensors
    with pytest.raises(DataError, match="id -1 in the val set"):
        fit("run", model=Text(), train=words(20), val=TensorDataset(ids - 1 - ids.min(), labels), test=None, modules=2)
    with pytest.raises(DataError, match="the val set has inputs that are no whole numbers"):
        fit("run", model=Text(), train=words(20), val=TensorDataset(ids.float(), labels), test=None, modules=2)


def test_what_is_no_id_where_ids_are_looked_up() -> None:
    ids, labels = words(20).tensors
    with pytest.raises(PartitionError, match="give them as whole numbers"):
        traced(Text(), image_set(TensorDataset(ids.float(), labels)))
    pixels = TensorDataset(torch.zeros(9, 2, 6, 6, dtype=torch.uint8), labels[:9])
    with pytest.raises(PartitionError, match="to have 1 channels, but got 2"):
        traced(net(), image_set(pixels))
    with pytest.raises(PartitionError, match=r"its weights are torch.float64.*model.float\(\)"):
        traced(net().double(), image_set(samples(9)))


def test_a_table_with_sparse_gradients_is_refused_unless_it_is_frozen(fit: Fit) -> None:
    model = Text()
    model.table = nn.Embedding(WORDS, 16, sparse=True)
    with pytest.raises(PartitionError, match=r"table \(Embedding\) has sparse = True"):
        fit("run", model=model, train=words(20), val=None, test=None, modules=2)
    model.table.weight.requires_grad_(False)
    assert fit("run", model=model, train=words(20), val=None, test=None, modules=2).status == "completed"


def test_a_set_without_whole_numbers_is_not_read_as_such() -> None:
    assert image_set(words(9)).whole == (0, WORDS - 1)
    source = image_set(samples(9))
    assert source.whole is None
    with pytest.raises(ValueError, match="out is"):
        source.read([0], torch.zeros(1, 1, 6, 6, dtype=torch.int64))
    check_ids(traced(net(), source), {"train": source})


def test_the_library_needs_no_more_than_its_defaults(fit: Fit) -> None:
    trainer = Trainer(Text(), TrainConfig(budget="64GB", epochs=1, threads=1), run_dir=fit.path("run"))
    assert trainer.fit(words(64), words(9, 1)).status == "completed"
