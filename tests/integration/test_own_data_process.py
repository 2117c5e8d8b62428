"""`trgl-device --data pkg.module:callable` with something wrong in it: told in words, by the process that found it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ondevice_trgl import RunDirError, TrainConfig
from ondevice_trgl.config import Workload
from ondevice_trgl.job import Job
from tests.asked_here import train_job

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = """
import torch
from torch.utils.data import Dataset, TensorDataset

class Broken(Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, index):
        if index == 12:
            raise KeyError("lost")
        return torch.full((1, 8, 8), float(index)), index % 4

def broken():
    print("reading")  # on stdout, which belongs to the answer
    return Broken()

def drawn():
    torch.seed()
    return TensorDataset(torch.randn(40, 1, 8, 8), torch.arange(40) % 4)

def ends():
    raise SystemExit("no data today")
"""


def train(folder: Path, data: str) -> subprocess.CompletedProcess[str]:
    (folder / "own.py").write_text(MODULE, encoding="utf-8")
    asked = ("train", "-b", "2GB", "--data", data, "-o", "run", "--threads", "1", "--epochs", "1", "--baseline", "skip")
    return subprocess.run(
        [sys.executable, "-m", "ondevice_trgl", *asked],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def told(done: subprocess.CompletedProcess[str]) -> str:
    """What a refusal says, in one line."""
    assert done.returncode == 2, done.stderr  # as for everything that the caller has to mend
    assert "Traceback" not in done.stderr
    assert "process failed" not in done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        ("own:broken", "sample 12 of own:broken (train) cannot be read: KeyError: 'lost'", "dataset[12] raises"),
        ("own:ends", "'own:ends' failed: SystemExit: no data today", ""),
    ],
)
def test_a_fault_of_the_dataset_comes_out_as_it_was_found(tmp_path: Path, data: str, message: str, hint: str) -> None:
    said = told(train(tmp_path, data))
    assert message in said
    assert hint in said
    assert not (tmp_path / "run").exists()


def test_a_callable_that_draws_other_samples_each_time_is_told_to_draw_from_a_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here in one process, which reads them twice as well."""
    (tmp_path / "own_and_drawn.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    config = TrainConfig(budget="64GB", epochs=1, threads=1)
    with pytest.raises(RunDirError, match=r"the data have changed since .*run was started") as caught:
        train_job(Job(Workload(data="own_and_drawn:drawn"), config, tmp_path / "run", baseline="skip"))
    wanted = "own_and_drawn:drawn has to return the same samples every time it is called: let it draw from a seed"
    assert caught.value.hint == wanted
    assert caught.value.exit_code == 2
