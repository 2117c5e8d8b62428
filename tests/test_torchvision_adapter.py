"""The adapter round a torchvision whose binary part does not load, in fresh processes: an import happens once."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

PATHS = [path for path in sys.path if path]


def run(script: str, *first: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join([*map(str, first), *PATHS])},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fake(folder: Path, source: str) -> Path:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(source)
    return folder


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_the_installed_torchvision_builds_models_whether_its_binary_part_loads_or_not() -> None:
    out = run(
        "from ondevice_trgl._torchvision import torchvision_module\n"
        "tv = torchvision_module()\n"
        "assert torchvision_module() is tv\n"
        "import torch, torchvision\n"
        "assert torchvision is tv\n"
        "print(tv.models.resnet18(num_classes=3).eval()(torch.zeros(1, 3, 32, 32)).shape[1])\n"
        "print(torch.ops.torchvision.nms.default._schema)\n"
    )
    assert out.splitlines()[0] == "3"
    assert "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" in out


FAULTY = """
import torch
import torchvision.part
if not hasattr(torch.ops.torchvision, "nms") or not hasattr(torch.ops.torchvision, "qnms"):
    raise RuntimeError("operator torchvision::nms does not exist")
fine = True
"""


def test_missing_schemas_are_defined_and_the_half_import_is_forgotten(tmp_path: Path) -> None:
    fake(tmp_path, FAULTY)
    (tmp_path / "torchvision" / "part.py").write_text("")
    out = run(
        "import sys\n"
        "from ondevice_trgl._torchvision import torchvision_module\n"
        "sys.modules['torchvision.left_over'] = sys\n"
        "print(torchvision_module().fine, 'torchvision.left_over' in sys.modules)\n",
        tmp_path,
    )
    assert out.split() == ["True", "False"]


def test_nothing_is_imported_early_and_nothing_defined_where_the_import_works(tmp_path: Path) -> None:
    out = run(
        "import sys, torch\n"
        "from ondevice_trgl._torchvision import torchvision_module\n"
        "print('torchvision' in sys.modules)\n"
        "torchvision_module()\n"
        "print(hasattr(torch.ops.torchvision, 'nms'))\n",
        fake(tmp_path, ""),
    )
    assert out.split() == ["False", "False"]


def test_what_cannot_be_helped_is_said(tmp_path: Path) -> None:
    cases = [
        ("raise ModuleNotFoundError('gone', name='torchvision')", "torchvision is not installed"),
        ("raise RuntimeError('another fault')", "cannot be imported: another fault"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "cannot be imported: operator torchvision"),
        ("raise ImportError('libfoo.so')", "cannot be imported: libfoo.so"),
        ("import numpy_of_another_age", "cannot be imported: No module named 'numpy_of_another_age'"),
    ]
    out = run(
        f"cases = {cases!r}\n"
        "import pathlib, sys\n"
        "from ondevice_trgl._torchvision import torchvision_module\n"
        "from ondevice_trgl.errors import UsageError\n"
        "sys.dont_write_bytecode = True\n"
        f"file = pathlib.Path({str(tmp_path)!r}, 'torchvision', '__init__.py')\n"
        "for source, message in cases:\n"
        "    file.write_text(source)\n"
        "    try:\n"
        "        torchvision_module()\n"
        "    except UsageError as error:\n"
        "        assert message in str(error) and error.hint, (message, str(error))\n"
        "        print('said')\n",
        fake(tmp_path, ""),
    )
    assert out.split() == ["said"] * len(cases)
