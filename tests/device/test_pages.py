import json
import sys
from pathlib import Path

import pytest

from ondevice_trgl.device.pages import _clean_code, release_code_pages

SMAPS = """\
1000-3000 r-xp 00000000 08:01 1                          /usr/lib/libbig.so
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
3000-5000 r-xp 00000000 08:01 1                          /usr/lib/patched.so
Rss:                   8 kB
Anonymous:             4 kB
VmFlags: rd ex mr mw me
5000-6000 r--p 00000000 08:01 1                          /usr/lib/relro.so
Rss:                   4 kB
Anonymous:             0 kB
VmFlags: rd mr mw me
6000-7000 r-xp 00000000 08:01 1                          /usr/lib/gone.so (deleted)
Rss:                   4 kB
Anonymous:             0 kB
VmFlags: rd ex
7000-8000 rwxp 00000000 00:00 0
Rss:                   4 kB
Anonymous:             4 kB
VmFlags: rd wr ex
"""


def test_only_clean_code_of_files_is_chosen() -> None:
    assert list(_clean_code(SMAPS)) == [(0x1000, 0x3000, 8192)]


def test_nothing_to_read_is_no_error(tmp_path: Path) -> None:
    assert release_code_pages(tmp_path) == 0


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc/self/smaps here")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_resident_code_goes_and_the_process_works_on(run_python) -> None:  # type: ignore[no-untyped-def]
    out = run_python(
        "import json, torch\n"
        "from ondevice_trgl.device.meter import meter_for\n"
        "from ondevice_trgl.device.pages import release_code_pages\n"
        "x = torch.randn(4, 3, 8, 8); w = torch.randn(5, 3, 3, 3); y = torch.nn.functional.conv2d(x, w)\n"
        "meter = meter_for('cpu'); before = meter.current_bytes()\n"
        "released = release_code_pages(); after = meter.current_bytes()\n"
        "same = bool(torch.equal(y, torch.nn.functional.conv2d(x, w)))\n"
        "print(json.dumps([before, released, after, same]))"
    )
    before, released, after, same = json.loads(out)
    assert same
    assert released > 20_000_000
    assert before - after > released // 2
