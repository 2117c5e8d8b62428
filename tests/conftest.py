"""Shared by all tests: a second interpreter with warnings as errors; property tests that ignore the clock."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before torch: spinning threads crawl on a busy machine
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]

settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")

RunPython = Callable[..., str]


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
