"""Loading a set of 24 MB and reading it must not take the memory of the set."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_SCRIPT = """
import sys
from pathlib import Path
import torch
from ondevice_trgl.data.registry import load_data

def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

load_data("digits", image_size=9).train[0]  # first use of the operators loads code
torch.set_num_threads(1)
Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS")
data = load_data("fashion-mnist", root=Path(sys.argv[1]), image_size=32, channels=3, scratch_dir=Path(sys.argv[2]))
out = torch.zeros(64, 3, 32, 32)
for start in range(0, 6400, 64):
    data.train.read(range(start, start + 64), out)
print(kib("VmHWM") - before, len(data.train))
assert not {"torchvision", "PIL", "torch._dynamo", "rich", "typer"} & set(sys.modules)
"""


def test_load_and_read_stay_small(write_fashion: Callable[..., Path], tmp_path: Path) -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("no /proc/self/clear_refs: peak RSS cannot be reset here")
    folder = write_fashion(30_000, 1_000)
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(folder), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
    )
    growth, train = map(int, done.stdout.split())
    assert train == 27_000
    # Positions, slots and labels of the splits (int64), a batch of 0.75 MiB, 1 MiB of work space, one gzip window.
    assert growth < 8 * 1024, f"peak RSS grew by {growth} KiB; the images are 23 700 KiB"
