"""Targets that are no class numbers: what is read, what is told from the data, what is asked for, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ondevice_trgl.data.assemble import assemble_user
from ondevice_trgl.data.bundle import Asked
from ondevice_trgl.data.holdout import as_trained, match_targets
from ondevice_trgl.data.preprocessing import Preprocessing
from ondevice_trgl.data.registry import load_data
from ondevice_trgl.data.table import held_out_listed, pictures_listed
from ondevice_trgl.data.user import image_set
from ondevice_trgl.errors import DataError
from ondevice_trgl.run.opening import sources

INPUTS = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
NUMBERS = torch.randn(12, 2, generator=torch.Generator().manual_seed(1))


def pairs(*targets: Any) -> list[tuple[Tensor, Any]]:
    """Samples with those targets, the first ones as they should be."""
    return [(INPUTS[k], target) for k, target in enumerate(targets)]


@pytest.mark.parametrize(
    ("target", "width"),
    [(0.5, 1), (torch.tensor(0.5), 1), (numpy.float64(0.5), 1), (torch.tensor([0.5]), 1), ([0.5, 1.0], 2),
     (numpy.array([0.5, -1.5, 2.0]), 3), (torch.tensor([0.5, 1.5], dtype=torch.float64), 2),
     (torch.tensor([0.5, 1.5], requires_grad=True), 2)],
)  # fmt: skip
def test_floats_are_a_regression_of_as_many_targets(target: Any, width: int) -> None:
    read = image_set(pairs(target, target), task="auto")
    assert (read.task, read.labels.dtype, tuple(read.labels.shape)) == ("regression", torch.float32, (2, width))
    assert torch.equal(read.read([1], torch.empty(1, 1, 4, 4)), read.labels[1:])
    one = read[0][1]
    assert isinstance(one, Tensor)
    assert torch.equal(one, read.labels[0])


@pytest.mark.parametrize("target", [1, numpy.int64(1), torch.tensor(1), True])
def test_whole_numbers_stay_classes(target: Any) -> None:
    read = image_set(pairs(0, target), task="auto")
    assert (read.task, read.labels.dtype, read.labels.tolist()) == ("classes", torch.int64, [0, 1])
    assert read[1][1] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_labels_that_are_there_or_not_come_in_any_dtype(dtype: torch.dtype) -> None:
    labels = torch.tensor([[1, 0, 1], [0, 0, 1]]).to(dtype)
    read = image_set(pairs(*labels), task="multi-label")
    assert (read.task, read.labels.dtype, read.labels.tolist()) == (
        "multi-label",
        torch.float32,
        [[1, 0, 1], [0, 0, 1]],
    )


@pytest.mark.parametrize(
    ("task", "targets", "message", "hint"),
    [
        ("auto", [[0.0, 1.0], [1.0, 1.0]], "vectors of 0 and 1: labels that are there or not, or numbers",
         "task = 'regression', or task = 'multi-label' (--task)"),
        ("auto", [[0.0, 1.0], [1.0, 0.0]], "vectors of 0 and 1", "one-hot classes are given as label.argmax()"),
        ("auto", [3.0, 1.0], "floats, and all are whole: class numbers, or amounts", "int(label) for classes"),
        ("auto", [torch.tensor([0, 1, 1]), torch.tensor([1, 1, 1])], "expected a whole number", "'multi-label'"),
        ("auto", [0, 0.5], "label of sample 1 of data is 0.5; expected a whole number", "task = 'regression'"),
        ("auto", [0.5, 1], "target of sample 1 of data is 1, whole; expected floats", "float(label)"),
        ("regression", [1, 0], "target of sample 0 of data is 1, whole; expected floats", "task = 'classes'"),
        ("regression", [torch.tensor([1, 2])], "a tensor of 2 elements, whole; expected floats", "label.float()"),
        ("regression", [0.5, float("nan")], "target 0 of sample 1 of data is nan; expected a finite number", "missing"),
        ("regression", [[0.5, 1e300]], "target 1 of sample 0 of data is inf", "missing"),
        ("regression", [[0.5], [0.5, 1.5]], "sample 1 of data has 2 targets; expected 1, as in the first", "as many"),
        ("regression", [torch.zeros(2, 2)], "a tensor of 4 elements; expected a number, or a vector", "shape (T,)"),
        ("regression", [torch.zeros(0)], "expected a number, or a vector", "shape (T,)"),
        ("regression", ["cat"], "is 'cat'; expected a number", "shape (T,)"),
        ("regression", [None], "is None; expected a number", "shape (T,)"),
        ("regression", [torch.zeros(2, device="meta")], "expected a number", "shape (T,)"),
        ("multi-label", [[0, 1], [2, 1]], "label 0 of sample 1 of data is 2; expected 0 or 1", "task = 'classes'"),
        ("multi-label", [[0, 0.5]], "label 1 of sample 0 of data is 0.5; expected 0 or 1", "1 for every label"),
        ("multi-label", [[0, float("nan")]], "label 1 of sample 0 of data is nan; expected 0 or 1", "1 for every"),
        ("multi-label", [[0, 1], [1]], "sample 1 of data has 1 labels; expected 2, as in the first", "as many"),
        ("classes", [0.5, 1.5], "label of sample 0 of data is 0.5; expected a whole number", "task = 'regression'"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_told_by_sample(task: str, targets: list[Any], message: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        image_set(pairs(*targets), name="data", task=task)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_what_the_training_set_tells_holds_for_all() -> None:
    whole = TensorDataset(INPUTS, torch.ones(12, 2))
    read = sources(TensorDataset(INPUTS, NUMBERS), whole, None)
    assert [getattr(one, "task", "") for one in read.values()] == ["regression"] * 2
    with pytest.raises(DataError, match="sample 0 of val set has 3 targets; expected 2, as in the first"):
        sources(TensorDataset(INPUTS, NUMBERS), TensorDataset(INPUTS, torch.randn(12, 3)), None)
    with pytest.raises(DataError, match="target of sample 0 of val set is tensor"):
        sources(TensorDataset(INPUTS, NUMBERS), TensorDataset(INPUTS, torch.arange(12)), None)


def test_a_set_of_ours_has_to_be_of_the_task_that_was_stated() -> None:
    known = load_data("synthetic:1x4x4:3:20").train
    with pytest.raises(DataError, match="class numbers, for task = 'classes'; asked for was 'regression'"):
        sources(known, None, None, "regression")
    with pytest.raises(DataError, match="digits has class numbers"):
        load_data("digits", task="multi-label")


class Stating(list[Any]):
    classes = ("x", "y")


def test_targets_are_called_what_the_dataset_says() -> None:
    bundle = assemble_user(Stating(pairs(*NUMBERS)), Asked("own:data"))
    assert bundle.preprocessing.task == "regression"
    assert (bundle.class_names, bundle.num_classes) == (("x", "y"), 2)
    assert [len(part) for part in (bundle.train, bundle.val, bundle.test)] == [10, 1, 1]
    assert "regression of 2 targets" in bundle.description
    assert Preprocessing.from_dict(bundle.preprocessing.to_dict()) == bundle.preprocessing
    assert assemble_user(Stating(pairs(*NUMBERS)), Asked("own:data")).digest == bundle.digest
    others = NUMBERS.clone()
    others[3] += 1.0
    assert assemble_user(Stating(pairs(*others)), Asked("own:data")).digest != bundle.digest
    with pytest.raises(DataError, match=r"states 2 names \(x, y\) and has 1 targets a sample"):
        assemble_user(Stating(pairs(*NUMBERS[:, :1])), Asked("own:data"))
    with pytest.raises(
        DataError, match=r"all 12 targets of own:data \(train\) are 0.5, 0.5: there is nothing to learn"
    ):
        assemble_user(Stating(pairs(*torch.full((12, 2), 0.5))), Asked("own:data"))


def test_a_limit_takes_the_first_ones() -> None:
    bundle = assemble_user(pairs(*NUMBERS), Asked("own:data", train_limit=5))
    assert len(bundle.train) == 5


def test_what_was_kept_of_a_run_from_before_is_classes() -> None:
    values = Preprocessing(("a", "b"), (1, 2, 2)).to_dict()
    del values["task"]
    assert Preprocessing.from_dict(values).task == "classes"


@pytest.mark.parametrize(("form", "task"), [("reg2", "regression"), ("multi2", "multi-label")])
def test_synthetic_targets_can_be_learned_by_a_linear_map(form: str, task: str) -> None:
    data = load_data(f"synthetic:1x8x8:{form}:300", seed=3)
    assert (data.preprocessing.task, data.train.task, data.num_classes) == (task, task, 2)
    assert [len(part) for part in (data.train, data.val, data.test)] == [300, 30, 30]
    images, targets = [], []
    for part in (data.train, data.test):
        out = torch.empty(len(part), 1, 8, 8)
        targets.append(part.read(range(len(part)), out))
        images.append(torch.cat([out.flatten(1), torch.ones(len(part), 1)], 1))
    guess = images[1] @ torch.linalg.lstsq(images[0], targets[0]).solution
    assert float((guess - targets[1]).square().mean()) < 0.2 * float(targets[1].var())
    if task == "regression":
        assert float(targets[0].std()) == pytest.approx(1.0, abs=0.1)
    else:
        assert targets[0].unique().tolist() == [0.0, 1.0]
    assert load_data(f"synthetic:1x8x8:{form}:300", seed=3).digest == data.digest


@pytest.mark.parametrize("spec", ["synthetic:1x8x8:reg0:9", "synthetic:1x8x8:reg:9", "synthetic:1x8x8:reg65:9",
                                  "synthetic:1x8x8:regression2:9"])  # fmt: skip
def test_a_malformed_form_of_targets_is_refused(spec: str) -> None:
    with pytest.raises(DataError, match=r"synthetic:|65 targets are too many"):
        load_data(spec)


def test_other_data_are_brought_to_the_order_of_the_runs_targets() -> None:
    known = Preprocessing(("x", "y"), (1, 4, 4), task="regression")
    order, told = match_targets(("y", "x"), known, what="other")
    assert (order.tolist(), told) == ([1, 0], ())
    assert match_targets(("0", "1"), known, what="other")[0].tolist() == [0, 1]
    assert match_targets(("a", "b"), known, what="other", by_order=True)[0].tolist() == [0, 1]
    with pytest.raises(DataError, match="other has no targets y, which the run was trained with; it has x, z"):
        match_targets(("x", "z"), known, what="other")
    with pytest.raises(DataError, match=r"other has 1 targets a sample \(x\), the run was trained with 2: x, y"):
        match_targets(("x",), known, what="other")
    given = image_set(pairs(*NUMBERS), task="regression")
    held = as_trained(given, ("y", "x"), "here", known, what="other", by_order=False).samples
    assert torch.equal(held.labels, NUMBERS[:, [1, 0]])
    assert torch.equal(held.read([5], torch.empty(1, 1, 4, 4)), NUMBERS[5:6, [1, 0]])
    with pytest.raises(DataError, match="other has class numbers, for task = 'classes'"):
        as_trained(image_set(pairs(0, 1)), ("a", "b"), "here", known, what="other", by_order=False)


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """A CSV file beside four files that are there."""
    for index in range(4):
        (tmp_path / f"{index}.png").touch()

    def write(*lines: str) -> Path:
        path = tmp_path / "numbers.csv"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


def test_a_table_has_targets_in_columns_of_their_own(table: Callable[..., Path]) -> None:
    path = table(
        "path,Target_w,note,target_h,split", "0.png,1,a,2.5,train", "1.png,-1e3,b,0,train", "2.png,0,c,4,val",
        "3.png,7,d,8,test",
    )  # fmt: skip
    listed = pictures_listed(path, "regression")
    assert (listed.task, listed.class_names) == ("regression", ("Target_w", "target_h"))
    labels = {split: [label for _, label in files] for split, files in listed.splits.items()}
    assert labels == {"train": [(1.0, 2.5), (-1000.0, 0.0)], "val": [(0.0, 4.0)], "test": [(7.0, 8.0)]}
    held = held_out_listed(path, "regression")
    assert [label for _, label in held.splits["test"]] == [(7.0, 8.0)]
    one = pictures_listed(table("file,label", "0.png,3", "1.png,4.5"), "regression")
    assert (one.class_names, [label for _, label in one.splits["train"]]) == (("label",), [(3.0,), (4.5,)])


@pytest.mark.parametrize(
    ("task", "lines", "message"),
    [
        ("auto", ["path,target_a,target_b", "0.png,1,2"], "has columns of targets: target_a, target_b"),
        ("regression", ["path,target", "0.png,red"], "line 2: column target has red; expected a number"),
        ("regression", ["path,target", "0.png,nan"], "line 2: column target has nan; expected a number"),
        ("regression", ["path,target_a,target_b", "0.png,1"], "line 2: 0.png has no number in column target_b"),
        ("regression", ["path,what", "0.png,1"], "has no column label or class"),
        ("multi-label", ["path,target_a", "0.png,1", "1.png,2"], "line 3: column target_a has 2; expected 0 or 1"),
        ("regression", ["path,target", "0.png,1", "0.png,2"], "has the label 2, in line 2 1"),
    ],
)
def test_what_is_wrong_in_a_table_of_numbers_is_told_by_line(
    table: Callable[..., Path], task: str, lines: list[str], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        pictures_listed(table(*lines), task)
    assert message in caught.value.message
    assert caught.value.hint


def test_class_folders_have_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has class folders, and task = 'regression' needs numbers") as caught:
        load_data(f"folder:{tmp_path}", task="regression")
    assert "csv:FILE" in caught.value.hint
