"""The weights out of a run, readable without this package."""

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ondevice_trgl import RunDirError, UsageError, export
from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.data.registry import load_data
from ondevice_trgl.export import export_run
from ondevice_trgl.job import Job
from ondevice_trgl.model.tensorfile import write_tensors
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.report.model import Report
from ondevice_trgl.run.callbacks import Callback, RunState
from ondevice_trgl.run.trained import TrainedRun
from tests.asked_here import train_job

pytestmark = pytest.mark.usefixtures("code_pages_kept")

DATA = "synthetic:1x8x8:3:60"
MODEL = "resnet-preact-3x4"


class Pause(Callback):
    def on_step_end(self, run: RunState) -> None:
        run.request_pause()


def train(path: Path, *callbacks: Callback) -> Report:
    config = TrainConfig(budget="64GB", modules=3, epochs=2, threads=1)
    return train_job(Job(Workload(model=MODEL, data=DATA), config, path, baseline="skip"), callbacks)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    path = tmp_path_factory.mktemp("export") / "run"
    return path, train(path)


def fresh() -> nn.Module:
    return build_model(MODEL, num_classes=3, in_shape=(1, 8, 8))


def test_the_last_head_is_the_users_model(run: tuple[Path, Report], tmp_path: Path) -> None:
    output = export_run(run[0], format="state-dict", head="last", output=tmp_path / "m.safetensors")
    assert output == tmp_path / "m.safetensors"
    model = fresh()
    model.load_state_dict(load_file(output), strict=True)
    data = load_data(DATA).test
    images = torch.stack([image for image, _ in data])
    with torch.no_grad():
        accuracy = float((model.eval()(images).argmax(1) == data.labels).double().mean())
    assert run[1].classifier is not None
    assert accuracy == run[1].classifier.test_accuracy


def test_a_head_in_between_comes_with_the_layers_up_to_it(run: tuple[Path, Report], tmp_path: Path) -> None:
    names = set(fresh().state_dict())
    sizes = []
    for head in (0, 1):
        tensors = load_file(export_run(run[0], format="state-dict", head=head, output=tmp_path / f"{head}"))
        own = {name for name in tensors if name.startswith("head.")}
        assert own
        assert tensors.keys() - own < names
        sizes.append(len(tensors) - len(own))
    assert sizes[0] < sizes[1] < len(names)


def test_best_is_the_head_that_validation_chose(run: tuple[Path, Report], tmp_path: Path) -> None:
    path, report = run
    best = report.accuracy.best_head
    assert best is not None
    files = [
        export_run(path, format="state-dict", head=head, output=tmp_path / str(head)) for head in ("best", str(best))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_exists_needs_force(run: tuple[Path, Report], tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    output.write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="exists") as caught:
        export_run(run[0], format="state-dict", head="last", output=output)
    assert "--force" in caught.value.hint
    assert output.read_text(encoding="utf-8") == "mine"
    export_run(run[0], format="state-dict", head="last", output=output, force=True)
    assert load_file(output).keys() == fresh().state_dict().keys()


def test_no_tensor_is_in_memory_whole(run: tuple[Path, Report], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    large = torch.zeros(4 << 20)
    write_tensors(copy / "model.safetensors", {"weight": large})
    tracemalloc.start()
    try:
        export_run(copy, format="state-dict", head="last", output=tmp_path / "m")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert torch.equal(load_file(tmp_path / "m")["weight"], large)
    assert peak < 4 << 20


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_is_no_output(run: tuple[Path, Report], tmp_path: Path, force: bool) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        export_run(run[0], format="state-dict", head="last", output=tmp_path, force=force)
    with pytest.raises(UsageError, match="is no folder"):
        export_run(run[0], format="state-dict", head="last", output=tmp_path / "a" / "b", force=force)
    assert list(tmp_path.iterdir()) == []


def test_formats_and_heads_that_do_not_exist(run: tuple[Path, Report], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="formats: state-dict") as caught:
        export_run(run[0], format="onyx", head="last", output=tmp_path / "m")
    assert "'onyx'" in caught.value.message
    with pytest.raises(UsageError, match="heads 0 to 3"):
        export_run(run[0], format="state-dict", head=4, output=tmp_path / "m")


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    train(tmp_path / "run", Pause())
    with pytest.raises(RunDirError, match="its status is paused"):
        export_run(tmp_path / "run", format="state-dict", head="last", output=tmp_path / "m")
    with pytest.raises(RunDirError, match="not a run directory"):
        export_run(tmp_path, format="state-dict", head="last", output=tmp_path / "m")


class Exports(Callback):
    """Of the run that is training, after every module and in the middle of the one behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found = folder, dict[str, bytes]()

    def on_step_end(self, run: RunState) -> None:
        if run.epoch or run.step > 1 or not run.module:
            return
        before = {path: path.read_bytes() for path in sorted(run.run_dir.rglob("*")) if path.is_file()}
        output = export_run(run.run_dir, format="state-dict", head=run.module - 1, output=self.folder / "m", force=True)
        self.found[str(run.module - 1)] = output.read_bytes()
        for head, word in ((run.module, "not trained to its end yet"), ("last", "not trained to its end yet")):
            with pytest.raises(UsageError, match=word):
                export_run(run.run_dir, format="state-dict", head=head, output=self.folder / "no")
        best = export_run(run.run_dir, format="state-dict", head="best", output=self.folder / "b", force=True)
        assert best.read_bytes() in self.found.values()
        assert {path: path.read_bytes() for path in sorted(run.run_dir.rglob("*")) if path.is_file()} == before


def test_a_run_that_is_training_has_the_heads_that_are_finished(tmp_path: Path) -> None:
    exports = Exports(tmp_path)
    report = train(tmp_path / "run", exports)
    assert report.status == "completed"
    assert list(exports.found) == ["0", "1", "2"]
    for head, found in exports.found.items():
        output = export_run(tmp_path / "run", format="state-dict", head=head, output=tmp_path / f"end{head}")
        assert output.read_bytes() == found


def test_a_run_that_keeps_changing_is_refused_in_words(
    run: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(range(99))
    monkeypatch.setattr(export, "_version", lambda file: (next(times), 0))
    with pytest.raises(RunDirError, match="changed while it was read"):
        export_run(run[0], format="state-dict", head=0, output=tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_in_the_next_lap_heads_behind_the_module_in_training_are_none(tmp_path: Path) -> None:
    """They were trained on what that module put out before."""
    seen: dict[int, list[int]] = {}

    class Watch(Callback):
        def on_step_end(self, run: RunState) -> None:
            if run.lap and not run.epoch and run.step == 1:
                try:
                    seen[run.module] = list(TrainedRun.open(run.run_dir).heads)
                except RunDirError:
                    seen[run.module] = []

    config = TrainConfig(budget="64GB", modules=2, epochs=1, threads=1, schedule="multi-lap", laps=2)
    train_job(Job(Workload(model=MODEL, data=DATA), config, tmp_path / "run", baseline="skip"), (Watch(),))
    assert seen == {0: [0, 1], 1: [0], 2: [0, 1]}  # a module's first step is not saved yet


def test_what_the_data_were_goes_with_the_weights(run: tuple[Path, Report], tmp_path: Path) -> None:
    output = export_run(run[0], format="state-dict", head="0", output=tmp_path / "m.safetensors")
    known = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    bundle = load_data(DATA)
    means, stds = bundle.preprocessing.mean, bundle.preprocessing.std
    assert means is not None
    assert stds is not None
    pixels = torch.cat([image * stds[0] + means[0] for image, _ in bundle.train])
    assert known["class_names"] == ["0", "1", "2"]
    assert (known["input_shape"], known["resize"], known["pixels"]) == ([1, 8, 8], "none", [0, 255])
    assert known["mean"] == [pytest.approx(float(pixels.mean()), abs=1e-3)]
    assert known["std"] == [pytest.approx(float(pixels.std(correction=0)), abs=1e-3)]
    assert run[1].preprocessing == known
    for file in (output, run[0] / "model.safetensors"):
        with safe_open(file, "pt") as opened:
            assert json.loads(opened.metadata()["preprocessing"]) == known


def test_neither_file_of_an_export_is_overwritten_unasked(run: tuple[Path, Report], tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("mine")
    with pytest.raises(UsageError, match=r"m\.json exists"):
        export_run(run[0], format="state-dict", head="last", output=tmp_path / "m.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]
    export_run(run[0], format="state-dict", head="last", output=tmp_path / "m.safetensors", force=True)
    assert "class_names" in (tmp_path / "m.json").read_text()


def test_a_folder_where_the_class_names_go_is_refused_before_anything_is_written(
    run: tuple[Path, Report], tmp_path: Path
) -> None:
    (tmp_path / "m.json").mkdir()
    with pytest.raises(UsageError, match=r"m\.json is a folder, where the class names go"):
        export_run(run[0], format="state-dict", head="last", output=tmp_path / "m.safetensors", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]
