"""What may be wrong with a dataset of the user's own: always a DataError with the sample, the dataset and a way out."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ondevice_trgl.data.samples import Samples
from ondevice_trgl.data.user import image_set
from ondevice_trgl.errors import DataError, StorageError

GOOD = [(torch.full((1, 4, 4), float(index)), index % 3) for index in range(9)]


class Own:
    """A dataset of nine good samples, of which number 5 is whatever `make` gives or raises."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Any:
        return self.make() if index == 5 else GOOD[index]


def refused(dataset: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        image_set(dataset, name="train set")
    return caught.value


def with_input(value: Any) -> Own:
    return Own(lambda: (value, 1))


def with_label(label: Any) -> Own:
    return Own(lambda: (torch.zeros(1, 4, 4), label))


def raising(error: BaseException) -> Own:
    def fail() -> Any:
        raise error

    return Own(fail)


class Image:
    """Stands for one of PIL's, which need not be here."""

    __module__ = "PIL.Image"


def made(make: Callable[[], Tensor]) -> Tensor:
    """Of a kind that torch warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


IMAGE = torch.zeros(1, 4, 4)
NOT_DENSE = "; expected a dense tensor of plain numbers"


@pytest.mark.parametrize(
    ("value", "message", "hint"),
    [
        (Image(), "is an Image; expected a torch.Tensor", "ToTensor"),
        (numpy.zeros((1, 4, 4)), "is a ndarray; expected a torch.Tensor", "torch.from_numpy"),
        ([0.0, 1.0], "is a list of 2; expected a torch.Tensor", "turn it into a tensor"),
        (None, "is a NoneType; expected a torch.Tensor", "turn it into a tensor"),
        (IMAGE.to_sparse(), f"is sparse (torch.sparse_coo){NOT_DENSE}", ".to_dense()"),
        (IMAGE.clone().requires_grad_(), f"requires gradients, which holds what it came from in memory{NOT_DENSE}",
         ".detach()"),
        (IMAGE.to(torch.complex64), f"has complex numbers (torch.complex64){NOT_DENSE}", "torch.view_as_real"),
        (made(lambda: torch.quantize_per_tensor(IMAGE, 0.1, 0, torch.quint8)),
         f"is quantized (torch.quint8){NOT_DENSE}", ".dequantize()"),
        (made(lambda: torch.nested.nested_tensor([IMAGE, IMAGE])), f"is nested{NOT_DENSE}", "to one shape"),
        (made(IMAGE[0].to_sparse_csr), f"is sparse (torch.sparse_csr){NOT_DENSE}", ".to_dense()"),
        (IMAGE.to("meta"), f"has a shape and no values (device meta){NOT_DENSE}", "on the CPU"),
        (torch.zeros(0, 4, 4), f"has no elements (shape 0x4x4){NOT_DENSE}", "leave it out"),
    ],
)  # fmt: skip
def test_an_input_that_is_no_dense_tensor(value: Any, message: str, hint: str) -> None:
    error = refused(with_input(value))
    assert error.message == f"the input of sample 5 of train set {message}"
    assert hint in error.hint


def test_an_input_of_another_shape() -> None:
    error = refused(with_input(torch.zeros(3, 4, 4)))
    assert error.message == "sample 5 of train set has shape 3x4x4; expected 1x4x4, the shape of the first"


@pytest.mark.parametrize(
    ("sample", "message", "hint"),
    [
        ({"image": IMAGE, "label": 1, "path": "x"}, "is a dict",
         "for example (sample['image'], sample['label']); it has 'image', 'label', 'path'"),
        ((IMAGE, 1, "x.png"), "is a tuple of 3", "return the first two alone"),
        ((IMAGE,), "is a tuple of 1", ""),
        (IMAGE, "is a Tensor", "TensorDataset(inputs, labels)"),
        (TensorDataset(IMAGE), "is a TensorDataset", "given as a tuple: (train, val[, test])"),
        (None, "is a NoneType", ""),
    ],
)  # fmt: skip
def test_a_sample_that_is_no_pair(sample: Any, message: str, hint: str) -> None:
    error = refused(Own(lambda: sample))
    assert error.message == f"sample 5 of train set {message}; expected a pair of (input tensor, label)"
    assert hint in error.hint


@pytest.mark.parametrize(
    ("label", "shown", "hint"),
    [
        (1.0, "1.0", "int(label)"),
        (torch.tensor(1.0), "tensor(1.)", "int(label)"),
        (0.5, "0.5", "the number of its class, from 0"),
        (float("nan"), "nan", "the number of its class, from 0"),
        ("cat", "'cat'", "the number of its class, from 0"),
        (None, "None", "the number of its class, from 0"),
        (torch.tensor([0, 1, 0]), "a tensor of 3 elements", "it looks one-hot: give label.argmax()"),
        (numpy.array([0.0, 1.0, 0.0]), "array([0., 1., 0.])", "it looks one-hot: give label.argmax()"),
        ([0, 1], "[0, 1]", "it looks one-hot"),
        (torch.tensor([0.3, 0.7]), "a tensor of 2 elements", "give one class a sample"),
        (torch.tensor([1, 1, 0]), "a tensor of 3 elements", "give one class a sample"),
        (torch.tensor(1, device="meta"), "tensor(..., device='meta', size=(), dtype=torch.int64)", "from 0"),
        (list("ab" * 40), f"{str(list('ab' * 40))[:80]}...", "from 0"),
    ],
)
def test_a_label_that_is_no_whole_number(label: Any, shown: str, hint: str) -> None:
    error = refused(with_label(label))
    assert error.message == f"the label of sample 5 of train set is {shown}; expected a whole number"
    assert hint in error.hint


@pytest.mark.parametrize("label", [2**70, -(2**63) - 1])
def test_a_label_that_no_class_can_have(label: int) -> None:
    error = refused(with_label(label))
    assert error.message == f"the label of sample 5 of train set is {label}; expected the number of a class"


def test_a_negative_label() -> None:
    error = refused(with_label(-1))
    assert error.message == "train set: 1 labels are out of range, the first is -1 (sample 5); expected 0..2"


@pytest.mark.parametrize(
    "label",
    [2, torch.tensor(2), torch.tensor([2]), torch.tensor(2, dtype=torch.uint8), numpy.int64(2), numpy.uint8(2),
     numpy.array(2)],
)  # fmt: skip
def test_a_whole_number_of_any_kind_is_a_label(label: Any) -> None:
    assert image_set(with_label(label))[5][1] == 2


@pytest.mark.parametrize("label", [True, numpy.bool_(True), torch.tensor(True)])
def test_true_and_false_are_classes_1_and_0(label: Any) -> None:
    assert image_set(with_label(label)).labels[5] == 1


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int64, torch.uint16,
     torch.uint32, torch.bool],
)  # fmt: skip
def test_inputs_of_any_plain_format_come_as_float32(dtype: torch.dtype) -> None:
    value = torch.tensor([[[0, 1], [1, 1]]]).to(dtype)
    read, _ = image_set([(value, 0), (torch.zeros(1, 2, 2).to(dtype), 1)])[0]
    assert read.dtype == torch.float32
    assert read.tolist() == [[[0.0, 1.0], [1.0, 1.0]]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fractions_of_any_width_come_as_float32(dtype: torch.dtype) -> None:
    read, _ = image_set([(torch.tensor([-1.5, 0.25], dtype=dtype), 0), (torch.zeros(2, dtype=dtype), 1)])[0]
    assert (read.dtype, read.tolist()) == (torch.float32, [-1.5, 0.25])


def test_what_reading_raises_is_told_with_what_it_was() -> None:
    cause = KeyError("lost")
    error = refused(raising(cause))
    assert error.message == "sample 5 of train set cannot be read: KeyError: 'lost'"
    assert error.__cause__ is cause
    assert error.hint == "dataset[5] raises the same"
    assert refused(raising(ValueError())).message == "sample 5 of train set cannot be read: ValueError"


def test_a_dataset_that_says_it_has_more_samples_than_it_has() -> None:
    error = refused(raising(IndexError("list index out of range")))
    assert error.message == "train set says it has 9 samples, sample 5 raises IndexError: list index out of range"
    assert "__len__" in error.hint


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no more"), StorageError("the disk is full")])
def test_interrupts_wants_of_memory_and_errors_of_ours_go_on_as_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        image_set(raising(error))
    assert caught.value is error


def test_what_is_raised_later_while_a_batch_is_read_is_told_the_same_way() -> None:
    dataset = Own(lambda: GOOD[5])
    read = image_set(dataset, name="train set")
    out = torch.zeros(3, 1, 4, 4)
    assert read.read([4, 5, 6], out).tolist() == [1, 2, 0]
    dataset.make = raising(OSError("gone")).make
    with pytest.raises(DataError, match="sample 5 of train set cannot be read: OSError: gone"):
        read.read([4, 5, 6], out)
    dataset.make = lambda: (torch.zeros(1, 4, 5), 1)
    with pytest.raises(DataError, match="sample 5 of train set has shape 1x4x5; expected 1x4x4"):
        read.read([5], out)


class Saying(Own):
    """Says what it is told to of its length; an exception is raised."""

    def __init__(self, *said: Any) -> None:
        super().__init__(lambda: GOOD[5])
        self.said = list(said)

    def __len__(self) -> Any:
        said = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        if isinstance(said, Exception):
            raise said
        return said


@pytest.mark.parametrize(
    ("said", "found"),
    [(-3, "returns -3"), (9.0, "returns 9.0"), ("9", "returns '9'"), (None, "returns None"),
     (2**70, f"returns {2**70}"), (KeyError("n"), "raises KeyError: 'n'")],
)  # fmt: skip
def test_a_length_that_is_none(said: Any, found: str) -> None:
    error = refused(Saying(said))
    assert error.message == f"__len__ of train set {found}; expected a whole number of at least 1"


def test_a_length_that_changes_or_is_zero() -> None:
    error = refused(Saying(9, 8))
    assert error.message == "train set said it has 9 samples, and now says 8"
    assert "must not change" in error.hint
    assert refused(Saying(0)).message == "train set is empty; expected at least one sample"


def test_a_length_far_beyond_the_samples_takes_no_memory_for_them() -> None:
    class Endless(Own):
        def __len__(self) -> int:
            return 10**15

    assert (
        "says it has 1000000000000000 samples, sample 9 raises IndexError" in refused(Endless(lambda: GOOD[5])).message
    )


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(GOOD)


class Counted(Stream):
    def __len__(self) -> int:
        return 9


class NoLength(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return GOOD[index]


class NoItems(Dataset[Any]):
    def __len__(self) -> int:
        return 9


@pytest.mark.parametrize(
    ("dataset", "kind", "hint"),
    [
        (Stream(), "a Stream", "list(dataset)"),
        (Counted(), "a Counted", "list(dataset)"),
        (iter(GOOD), "a list_iterator", "list(dataset)"),
        (DataLoader(GOOD), "a DataLoader", "loader.dataset"),  # type: ignore[arg-type]
        (NoLength(), "a NoLength", "add __len__ to NoLength"),
        (None, "a NoneType", ""),
        (Own, "a type", ""),
    ],
)
def test_what_is_not_map_style(dataset: Any, kind: str, hint: str) -> None:
    error = refused(dataset)
    assert error.message == f"train set is {kind}; expected a map-style dataset, with __len__ and __getitem__"
    assert hint in error.hint


def test_a_dataset_without_samples_by_number() -> None:
    assert "sample 0 of train set cannot be read: NotImplementedError" in refused(NoItems()).message
    assert "sample 0 of train set cannot be read: KeyError: 0" in refused({"train": GOOD, "val": GOOD}).message


def test_whole_numbers_are_read_as_they_are_where_they_are_asked_for() -> None:
    samples = Samples([(torch.tensor([7, 255], dtype=torch.uint8), 0), (torch.tensor([0.5, 1.0]), 1)], name="words")
    value, _ = samples.read(0, torch.int64)
    assert (value.dtype, value.tolist()) == (torch.int64, [7, 255])
    with pytest.raises(DataError, match=r"sample 1 of words is torch.float32; expected whole numbers"):
        samples.read(1, torch.int64)


def test_the_range_of_whole_numbers_is_known_in_every_format() -> None:
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.uint16, torch.uint32):
        values: list[tuple[Tensor, int]] = [(torch.tensor([3, 0]).to(dtype), 0), (torch.tensor([1, 90]).to(dtype), 1)]
        assert image_set(values).whole == (0, 90)
