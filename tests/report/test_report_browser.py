"""The page in a browser, where there is one: as wide as the window on a desktop and on a phone, and no complaint."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ondevice_trgl.report.html import to_html
from ondevice_trgl.report.model import Report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ASKED = """<script>
const wide = [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll") &&
  e.getBoundingClientRect().right > innerWidth + 1);
document.title = JSON.stringify({page: document.documentElement.scrollWidth, window: innerWidth, wide: wide.length});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")
@pytest.mark.parametrize("width", [1000, 500])  # narrower no browser makes its window; a phone's layout is below 560
def test_nothing_is_wider_than_the_window(width: int, tmp_path: Path) -> None:
    sample = json.loads((Path(__file__).parent / "sample.json").read_text(encoding="utf-8"))
    points = [{"seconds": float(i), "bytes": 10**8 + i * 10**6, "module": i // 3} for i in range(9)]
    page = to_html(Report.from_dict({**sample, "timeline": points}))
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", f"{ASKED}</body>"), encoding="utf-8")
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", "--dump-dom", path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", shown.stdout)
    assert title is not None
    found = json.loads(title[1])
    assert found["page"] <= found["window"] == width
    assert found["wide"] == 0
    assert "CONSOLE" not in shown.stderr
