"""`trgl-device --data pkg.module:callable` with something wrong in it: told in words, by the process that found it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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

def from_one():
    return TensorDataset(torch.randn(40, 1, 8, 8), torch.arange(40) % 4 + 1)

def ends():
    raise SystemExit("no data today")
"""


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        (
            "own:broken",
            "sample 12 of own:broken (train) cannot be read: KeyError: 'lost'",
            "dataset[12] raises the same",
        ),
        ("own:from_one", "own:from_one (train): labels go from 1 to 4, expected 0 to 3", "subtract 1"),
        ("own:ends", "'own:ends' failed: SystemExit: no data today", ""),
    ],
)
def test_a_fault_of_the_dataset_comes_out_as_it_was_found(tmp_path: Path, data: str, message: str, hint: str) -> None:
    (tmp_path / "own.py").write_text(MODULE, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "ondevice_trgl", "train", "-b", "2GB", "--data", data, "-o", "run", "--threads", "1"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr  # as for everything that the caller has to mend
    said = " ".join(done.stderr.split())
    assert message in said
    assert hint in said
    assert "Traceback" not in done.stderr
    assert "process failed" not in done.stderr
    assert not (tmp_path / "run").exists()
