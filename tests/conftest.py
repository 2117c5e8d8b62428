"""Shared by all tests: a second interpreter with warnings as errors; property tests that ignore the clock.

The user's cache folder is one of the session's own, for the processes that tests start too: no figure that was measured
before decides what a test sees, and none that a test measures stays behind.
"""

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch: spinning threads crawl on a busy machine
_CACHE = tempfile.TemporaryDirectory(prefix="trgl-tests-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
REPOSITORY = Path(__file__).resolve().parents[1]

settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")

RunPython = Callable[..., str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole processes, the longest tests, come first: at the end two workers have short ones to share."""
    items.sort(key=lambda item: "integration" not in item.path.parts)


_modules = 0


def pytest_runtest_setup() -> None:
    """What is imported by now stays: a collection, of which every run makes several, need not walk it each time.

    Looked at before every test: one that imports torch._dynamo makes each run after it twice as long.
    """
    global _modules
    if len(sys.modules) != _modules:
        _modules = len(sys.modules)
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    """Take the cache folder away."""
    _CACHE.cleanup()


@pytest.fixture
def code_pages_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process keeps its code pages: for tests of what training comes to, not of what it takes; a third quicker."""
    from ondevice_trgl import trainer
    from ondevice_trgl.plan import estimate
    from ondevice_trgl.run import budget
    from ondevice_trgl.setup import helper, planning, staging, steps

    for module in (trainer, estimate, budget, helper, planning, staging, steps):
        monkeypatch.setattr(module, "release_code_pages", lambda: 0)


@pytest.fixture
def run_python() -> RunPython:
    """Runs source in a fresh interpreter that finds the package; returns stdout, fails the test with stderr."""

    def run(source: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", source],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
