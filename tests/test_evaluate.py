"""A trained run on other data: normalised, cut and labelled as in training."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ondevice_trgl import BudgetInfeasibleError, DataError, UsageError
from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.data.prepared import prepared_dir
from ondevice_trgl.job import Job
from ondevice_trgl.jobs import evaluate_run, predict_run, resume_job
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.report.model import read_report
from tests.asked_here import train_job

pytestmark = pytest.mark.usefixtures("code_pages_kept")

Image = pytest.importorskip("PIL.Image")
MODEL, SIZE = "resnet-preact-3x4", 8
RED, BLUE = (200, 60, 60), (60, 60, 200)


def fill(root: Path, names: Sequence[str] = ("cats", "dogs"), count: int = 12, dim: int = 1, seed: int = 0) -> Path:
    """Class folders of noisy red and blue pictures, as bright as one in `dim`."""
    draw = np.random.default_rng(seed)
    for name, colour in zip(names, (RED, BLUE), strict=False):
        (root / name).mkdir(parents=True)
        for index in range(count):
            noise = draw.integers(-40, 41, (10, 14, 3))
            pixels = np.clip((np.array(colour)[None, None] + noise) // dim, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:02d}.png")
    return root


def train(folder: Path, path: Path, **changes: Any) -> None:
    config = TrainConfig(budget="64GB", modules=2, epochs=4, threads=1, batch_size=4, lr=0.02)
    work = Workload(model=MODEL, data=f"folder:{folder}", image_size=SIZE, **changes)
    assert train_job(Job(work, config, path, baseline="skip")).status == "completed"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures in `a`, a run trained on them, and others to hold against it."""
    home = tmp_path_factory.mktemp("pictures")
    train(fill(home / "a"), home / "run")
    fill(home / "dusk", count=20, dim=3, seed=1)
    fill(home / "same", count=20, seed=2)
    return home


def plain_torch(home: Path, folder: Path) -> tuple[list[Path], torch.Tensor]:
    """Files and class probabilities, by nothing but torch, Pillow, the exported weights and what lies with them."""
    known = read_report(home / "run").preprocessing
    model = build_model(MODEL, num_classes=2, in_shape=(3, SIZE, SIZE))
    model.load_state_dict(load_file(home / "run" / "model.safetensors"))
    files, inputs = sorted(folder.rglob("*.png")), []
    for file in files:
        with Image.open(file) as image:
            square = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(2, 0, 12, 10))
        pixels = torch.tensor(np.asarray(square)).permute(2, 0, 1).double()
        mean, std = (torch.tensor(known[name], dtype=torch.float64).view(3, 1, 1) for name in ("mean", "std"))
        inputs.append(((pixels - mean) / std).float())
    with torch.no_grad():
        return files, model.eval()(torch.stack(inputs)).softmax(1)


@pytest.mark.parametrize("other", ["same", "dusk"])
def test_a_hold_out_is_measured_whole_with_the_mean_and_spread_of_training(home: Path, other: str) -> None:
    files, likely = plain_torch(home, home / other)
    right = [("cats", "dogs")[int(row.argmax())] == file.parent.name for file, row in zip(files, likely, strict=True)]
    result = evaluate_run(home / "run", head="last", data=f"folder:{home / other}")
    assert result["samples"] == 40
    assert result["accuracy"] == sum(right) / 40
    assert result["matches_report"] is None
    if other == "same":
        assert result["accuracy"] == 1.0


def test_predictions_are_those_of_plain_torch(home: Path) -> None:
    files, likely = plain_torch(home, home / "dusk")
    result = predict_run(home / "run", [home / "dusk"], head="last", top=5)
    assert [one["file"] for one in result["predictions"]] == [str(file) for file in files]
    for one, row in zip(result["predictions"], likely, strict=True):
        assert one["class"] == ("cats", "dogs")[int(row.argmax())]
        assert one["confidence"] == pytest.approx(float(row.max()), abs=1e-4)
        assert [best["label"] for best in one["top"]] == row.argsort(descending=True).tolist()
        assert sum(best["confidence"] for best in one["top"]) == pytest.approx(1, abs=1e-5)
    assert len(predict_run(home / "run", [home / "dusk"], head="ensemble")["predictions"][0]["top"]) == 1


def test_predictions_in_groups_are_the_same(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = predict_run(home / "run", [home / "same"])
    monkeypatch.setattr("ondevice_trgl.evaluate._GROUP_BYTES", 3 * 4 * 2)
    again = predict_run(home / "run", [home / "same"])["predictions"]
    assert [(one["file"], one["class"]) for one in again] == [
        (one["file"], one["class"]) for one in whole["predictions"]
    ]
    assert [one["confidence"] for one in again] == pytest.approx([one["confidence"] for one in whole["predictions"]])


def test_pictures_are_named_one_by_one(home: Path) -> None:
    paths = [home / "same" / "dogs" / "03.png", home / "same" / "cats" / "07.png"]
    found = predict_run(home / "run", paths)["predictions"]
    assert [(one["file"], one["class"]) for one in found] == [(str(paths[0]), "dogs"), (str(paths[1]), "cats")]
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        predict_run(home / "run", [home / "gone.png"])
    (home / "notes.txt").write_text("no picture")
    with pytest.raises(DataError, match=r"notes\.txt cannot be read as an image"):
        predict_run(home / "run", [home / "notes.txt"])


def test_classes_are_matched_by_name_however_they_sort(home: Path, tmp_path: Path) -> None:
    fill(tmp_path / "b", ("CATS", "dogs"))
    assert evaluate_run(home / "run", data=f"folder:{tmp_path / 'b'}")["accuracy"] == 1.0
    (tmp_path / "b" / "CATS").rename(tmp_path / "b" / "x_cats")
    (tmp_path / "b" / "dogs").rename(tmp_path / "b" / "a_dogs")
    with pytest.raises(DataError, match=r"not trained with: a_dogs, x_cats; the run's are cats, dogs") as refused:
        evaluate_run(home / "run", data=f"folder:{tmp_path / 'b'}")
    assert "--classes-from-order" in refused.value.hint
    insisted = evaluate_run(home / "run", data=f"folder:{tmp_path / 'b'}", by_order=True)
    assert insisted["accuracy"] == 0.0, "which is what was insisted on"
    assert "a_dogs as cats, x_cats as dogs" in insisted["told"][1]


def test_other_animals_are_no_cats_and_dogs(home: Path, tmp_path: Path) -> None:
    fill(tmp_path / "b", ("apes", "bees"))
    with pytest.raises(DataError, match="not trained with: apes, bees"):
        evaluate_run(home / "run", data=f"folder:{tmp_path / 'b'}")
    fill(tmp_path / "c", ("cats", "dogs"))
    fill(tmp_path / "c", ("eels",))
    with pytest.raises(DataError, match="not trained with: eels"):
        evaluate_run(home / "run", data=f"folder:{tmp_path / 'c'}")
    with pytest.raises(DataError, match="has 3 classes, the run was trained with 2: cats, dogs"):
        evaluate_run(home / "run", data=f"folder:{tmp_path / 'c'}", by_order=True)


def test_one_class_is_enough_to_hold_out_and_those_missing_are_told(home: Path, tmp_path: Path) -> None:
    fill(tmp_path / "b", ("dogs",))  # red ones
    result = evaluate_run(home / "run", data=f"folder:{tmp_path / 'b'}")
    assert (result["samples"], result["accuracy"]) == (12, 0.0)
    assert any("no samples: cats" in line for line in result["told"])


def test_of_a_hold_out_with_splits_the_test_split_counts(home: Path, tmp_path: Path) -> None:
    for name, count in (("train", 5), ("valid", 4), ("Test", 3)):
        fill(tmp_path / "b" / name, count=count)
    assert evaluate_run(home / "run", data=f"folder:{tmp_path / 'b'}")["samples"] == 6


def test_the_runs_own_data_keep_its_mean_and_spread_whatever_was_added(home: Path, tmp_path: Path) -> None:
    """A picture that was added changes what is carved, not how pixels are normalised."""
    folder = fill(tmp_path / "a")
    train(folder, tmp_path / "run")
    for file in (folder / "cats").iterdir():
        Image.new("RGB", (14, 10), (255, 255, 255)).save(file)
    result = evaluate_run(tmp_path / "run", head="last")
    assert result["matches_report"] is None, "these are other data than the report's"
    assert "not the data of the training any more" in result["told"][-1]
    assert read_report(tmp_path / "run").preprocessing == read_report(home / "run").preprocessing


def test_a_run_is_evaluated_from_anywhere_and_with_its_data_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    fill(project / "pictures")
    monkeypatch.chdir(project)
    train(Path("pictures"), Path("run"))
    monkeypatch.chdir("/")
    assert evaluate_run(project / "run")["matches_report"] is True
    project.rename(tmp_path / "elsewhere")
    assert evaluate_run(tmp_path / "elsewhere" / "run")["matches_report"] is True


def test_the_runs_own_pictures_are_known_however_their_path_is_written(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what was trained on would be measured, and called a hold-out."""
    monkeypatch.chdir(home)
    (tmp_path / "link").symlink_to(home / "a")
    for name in ("folder:a", "folder:./a/", f"folder:{tmp_path / 'link'}", f"folder:{home}/dusk/../a"):
        result = evaluate_run(home / "run", data=name)
        assert (result["samples"], result["matches_report"]) == (2, True)
        assert len(result["told"]) == 1
    assert evaluate_run(home / "run", data="folder:dusk")["samples"] == 40


@pytest.mark.long
def test_the_runs_own_pictures_are_decoded_within_the_budget_too(tmp_path: Path) -> None:
    """What was prepared makes room for others: then it is decoded again, while torch is not here."""
    folder = fill(tmp_path / "a")
    Image.new("RGB", (6000, 5000), BLUE).save(folder / "dogs" / "99.png")
    train(folder, tmp_path / "run")
    paused = tmp_path / "paused"
    shutil.copytree(tmp_path / "run", paused)
    report = json.loads((paused / "report.json").read_text())
    (paused / "report.json").write_text(json.dumps({**report, "status": "paused"}))
    for file in prepared_dir().iterdir():
        file.unlink()
    for use in (evaluate_run, resume_job):
        run = tmp_path / "run" if use is evaluate_run else paused
        with pytest.raises(BudgetInfeasibleError, match=r"decoding .*99\.png \(6000x5000 pixels\) takes"):
            use(run, budget="120MB")
    assert evaluate_run(tmp_path / "run")["matches_report"] is True


def test_pictures_of_the_training_that_are_gone_are_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "a")
    train(folder, tmp_path / "run")
    folder.rename(tmp_path / "b")
    with pytest.raises(DataError, match=r"/a is gone, where the pictures are that the run was trained with") as gone:
        evaluate_run(tmp_path / "run")
    assert "--data folder:PATH" in gone.value.hint
    assert evaluate_run(tmp_path / "run", data=f"folder:{tmp_path / 'b'}")["samples"] == 24


def test_a_network_of_bytes_wants_bytes(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "others.py").write_text(
        "import torch\n"
        "def pixels(dtype, count=10):\n"
        "    colours = torch.tensor([[200, 60, 60], [60, 60, 200]], dtype=torch.uint8)\n"
        "    pictures = [(colours[k % 2].view(3, 1, 1).expand(3, 8, 8).to(dtype), k % 2) for k in range(count)]\n"
        "    class Named(list):\n"
        "        classes = ['cats', 'dogs']\n"
        "    return Named(pictures)\n"
        "def as_bytes(): return pixels(torch.uint8)\n"
        "def as_floats(): return pixels(torch.float32)\n"
        "def turned():\n"
        "    found = pixels(torch.uint8)\n"
        "    found.classes = ['dogs', 'cats']\n"
        "    return found\n"
        "def three(): return pixels(torch.uint8), pixels(torch.uint8), pixels(torch.uint8, 6)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert evaluate_run(home / "run", data="others:as_bytes")["accuracy"] == 1.0
    assert evaluate_run(home / "run", data="others:turned")["accuracy"] == 0.0
    assert evaluate_run(home / "run", data="others:three")["samples"] == 6
    with pytest.raises(DataError, match=r"others:as_floats gives torch\.float32, the run was trained with pixels"):
        evaluate_run(home / "run", data="others:as_floats")


def test_pictures_say_nothing_to_a_network_whose_inputs_code_made(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made.py").write_text(
        "import torch\ndef data(): return [(torch.full((3, 8, 8), k % 2 + 0.01 * (k % 7)), k % 2) for k in range(40)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = TrainConfig(budget="64GB", modules=2, epochs=1, threads=1, batch_size=4)
    train_job(Job(Workload(model=MODEL, data="made:data"), config, tmp_path / "run", baseline="skip"))
    assert evaluate_run(tmp_path / "run", data="made:data")["matches_report"] is True
    with pytest.raises(DataError, match="inputs that a dataset's own code made"):
        evaluate_run(tmp_path / "run", data=f"folder:{home / 'a'}")
    with pytest.raises(DataError, match="inputs that a dataset's own code made"):
        predict_run(tmp_path / "run", [home / "a"])


def test_a_head_that_is_not_there_is_refused_before_anything_is_read(home: Path) -> None:
    with pytest.raises(UsageError, match="no head '9'"):
        predict_run(home / "run", [home / "gone.png"], head="9")


@pytest.mark.long
def test_names_in_any_bytes_reach_the_end(tmp_path: Path) -> None:
    """A Latin-1 folder name on a UTF-8 system."""
    folder = fill(tmp_path / "pictures")
    (folder / "cats").rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9"))
    train(folder, tmp_path / "run")
    assert "caf\\xe9" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "run" / "report.json").read_text())["preprocessing"]["class_names"][0] == "caf\\xe9"
    assert (
        evaluate_run(
            tmp_path / "run",
        )["matches_report"]
        is True
    )
    place = os.fsdecode(os.fsencode(tmp_path) + b"/stra\xdfe")
    folder.rename(place)
    train(Path(place), tmp_path / "second")
    assert (tmp_path / "second" / "report.html").is_file()
    result = predict_run(tmp_path / "second", [Path(place)])
    assert {one["class"] for one in result["predictions"]} == {"caf\\xe9", "dogs"}
    json.dumps(result).encode("ascii")


def test_pictures_are_decoded_within_the_budget_before_torch_comes(home: Path, tmp_path: Path) -> None:
    large = fill(tmp_path / "b", ("dogs",), count=2)
    Image.new("RGB", (6000, 5000), BLUE).save(large / "dogs" / "99.png")
    for use in (
        lambda: evaluate_run(home / "run", data=f"folder:{large}", budget="120MB"),
        lambda: predict_run(home / "run", [large], budget="120MB"),
    ):
        with pytest.raises(BudgetInfeasibleError, match=r"decoding .*99\.png \(6000x5000 pixels\) takes"):
            use()  # type: ignore[no-untyped-call]
    assert predict_run(home / "run", [large])["predictions"][-1]["class"] == "dogs"
