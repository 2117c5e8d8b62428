"""The program as a process: what it loads, how it ends when its reader leaves, that it is `python -m` too."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLE = REPOSITORY / "tests" / "report" / "sample.json"


def environment(**values: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), **values}


def test_help_loads_no_torch(run_python: Callable[..., str]) -> None:
    out = run_python(
        "import json, sys\n"
        "from ondevice_trgl.cli import main\n"
        "assert main(['train', '--help']) == 0\n"
        "print(json.dumps([name for name in ('torch', 'numpy', 'torchvision') if name in sys.modules]))"
    )
    assert json.loads(out.splitlines()[-1]) == []


def test_a_usage_error_loads_no_torch_and_piped_output_no_rich(run_python: Callable[..., str]) -> None:
    out = run_python(
        "import json, sys\n"
        "from ondevice_trgl.cli import main\n"
        "assert main(['train']) == 2\n"
        f"assert main(['report', {str(SAMPLE.parent / 'absent')!r}]) == 2\n"
        "print(json.dumps([name for name in ('torch', 'rich') if name in sys.modules]))"
    )
    assert json.loads(out.splitlines()[-1]) == []


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ondevice_trgl", "train", "-b", "x"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "budget = 'x'" in done.stderr


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(SAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "ondevice_trgl", "report", str(tmp_path)],
        env=environment(),
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == ""


def test_a_poor_encoding(tmp_path: Path) -> None:
    record = json.loads(SAMPLE.read_text(encoding="utf-8"))
    record["modules"][0]["name"] = "größe"
    (tmp_path / "report.json").write_text(json.dumps(record), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "ondevice_trgl", "report", str(tmp_path)],
        env=environment(PYTHONIOENCODING="ascii"),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert rb"gr\xf6\xdfe" in done.stdout
