"""A lean process imports at a lower peak; a program that embeds the library stays as it is."""

import contextlib
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ondevice_trgl.device.lean import imports_kept

LEAN = "from ondevice_trgl.device.lean import make_lean\nmake_lean()\n"
RunPython = Callable[..., str]


def test_an_app_is_left_as_it_is(run_python: RunPython) -> None:
    run_python(
        "import os, sys\nbefore = list(sys.meta_path), dict(os.environ)\n"
        "import ondevice_trgl.jobs, ondevice_trgl.setup.planning, ondevice_trgl.device.lean\n"
        "from ondevice_trgl import Trainer\n"
        "from ondevice_trgl.cli import main\n"
        "assert main(['plan', '--model', 'none', '--budget', '1GB']) == 2\n"
        "assert (list(sys.meta_path), dict(os.environ)) == before\n"
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}),
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}),
        ({"DNNL_PRIMITIVE_CACHE_CAPACITY": "7"}, {"DNNL_PRIMITIVE_CACHE_CAPACITY": "7"}),
    ],
)
def test_onednns_cache_is_bounded_unless_the_user_has_bounded_it(
    run_python: RunPython, given: dict[str, str], expected: dict[str, str]
) -> None:
    out = run_python(
        f"import json, os\n{LEAN}{LEAN}"
        "print(json.dumps({name: value for name, value in os.environ.items() if 'PRIMITIVE_CACHE' in name}))",
        **given,
    )
    assert json.loads(out) == expected


def test_a_module_is_run_as_python_would(tmp_path: Path) -> None:
    (tmp_path / "as_main.py").write_text(
        "import sys\nprint(__name__, sys.argv[1:], sys.argv[0] == __file__, len(sys.meta_path))\nsys.exit(3)\n",
        encoding="utf-8",
    )
    outs = []
    for module in (["as_main"], ["ondevice_trgl.device.lean", "as_main"]):
        done = subprocess.run(
            [sys.executable, "-m", *module, "a", "b"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 3, done.stderr
        outs.append(done.stdout.split())
    *usual, finders = outs[0]
    assert outs[1] == [*usual, str(int(finders) + 1)]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc/self/statm here")
def test_importing_torch_takes_less(run_python: RunPython) -> None:
    peak = (
        "import torch\nfrom ondevice_trgl.device.meter import own_peak_rss\n"
        "x = torch.nn.functional.conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 2, 2)).sum()\n"
        "print(own_peak_rss(), float(x))"
    )
    (plain, result), (lean, same) = (map(float, run_python(before + peak).split()) for before in ("", LEAN))
    assert plain - lean > 15_000_000
    assert (result, same) == (36.0, 36.0)


def test_without_proc_it_does_nothing(run_python: RunPython) -> None:
    run_python(
        "import os\n"
        "opened = os.open\n"
        "def no_proc(path, *rest):\n"
        "    if str(path).startswith('/proc'):\n"
        "        raise FileNotFoundError(2, 'No such file or directory')\n"
        "    return opened(path, *rest)\n"
        f"os.open = no_proc\n{LEAN}import torch\n"
    )


@pytest.mark.parametrize("collects", [True, False])
def test_collecting_is_put_off_while_importing_and_not_longer(monkeypatch: pytest.MonkeyPatch, collects: bool) -> None:
    now = [collects]
    monkeypatch.setattr(gc, "isenabled", lambda: now[0])
    monkeypatch.setattr(gc, "disable", lambda: now.__setitem__(0, False))
    monkeypatch.setattr(gc, "enable", lambda: now.__setitem__(0, True))
    with contextlib.suppress(ImportError), imports_kept():
        assert now == [False]
        raise ImportError
    assert now == [collects]
