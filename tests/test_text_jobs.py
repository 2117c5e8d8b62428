"""Jobs on text: ids by name, from the plan to the baselines and back from the run directory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ondevice_trgl import DataError, TrainConfig, baseline
from ondevice_trgl.config import Workload
from ondevice_trgl.export import export_run
from ondevice_trgl.job import BaselineRequest, Job
from ondevice_trgl.jobs import evaluate_run
from ondevice_trgl.run.guards import global_state_kept
from tests.asked_here import plan_job, train_job
from tests.run.test_inputs import Text, accuracy, words

pytestmark = pytest.mark.usefixtures("code_pages_kept")

HERE = "tests.test_text_jobs"


class Doubled(nn.Module):
    """A layer that no blueprint can name."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def sets() -> tuple[Any, ...]:
    return words(60), words(30, 1), words(30, 2)


def wild() -> tuple[Any, ...]:
    ids, labels = words(30, 2).tensors
    return words(60), words(30, 1), torch.utils.data.TensorDataset(ids + 10 * (ids == ids.max()), labels)


def own_code(num_classes: int) -> nn.Module:
    model = Text()
    model.mix.append(Doubled())
    return model


def job(path: Path, model: str) -> Job:
    config = TrainConfig(budget="64GB", modules=2, epochs=2, batch_size=16, threads=1)
    return Job(Workload(model=f"{HERE}:{model}", data=f"{HERE}:sets"), config, path, baseline="skip")


@pytest.mark.parametrize("model", ["Text", "own_code"])
def test_trained_evaluated_and_exported_by_name(tmp_path: Path, model: str) -> None:
    asked = job(tmp_path / "run", model)
    assert plan_job(asked).status == "planned"
    report = train_job(asked)
    assert report.status == "completed"
    assert (report.workload["input_shape"], report.workload["num_classes"]) == ([7], 3)
    for head in range(len(report.heads)):
        measured = evaluate_run(tmp_path / "run", head=str(head))
        assert measured["matches_report"], measured
        assert measured["accuracy"] == report.heads[head].test_accuracy
    with pytest.raises(DataError, match="id 59 in the test set is out of range"):
        evaluate_run(tmp_path / "run", data=f"{HERE}:wild")
    file = export_run(tmp_path / "run", format="state-dict", head="last", output=tmp_path / "out.safetensors")
    fresh = Text() if model == "Text" else own_code(3)
    fresh.load_state_dict(load_file(file))
    assert accuracy(fresh, words(30, 2)) == report.heads[-1].test_accuracy


@pytest.mark.parametrize("name", ["plain", "e2e", "e2e_accumulate", "e2e_checkpoint"])
def test_baselines_on_ids(tmp_path: Path, name: str) -> None:
    asked = job(tmp_path, "Text")
    request = BaselineRequest(
        name=name, workload=asked.workload, config=asked.config, batch_size=16, scratch_dir=tmp_path, accumulate=4
    )
    with global_state_kept(1):
        measured = baseline._measure(request)
    assert measured.status == "measured"
