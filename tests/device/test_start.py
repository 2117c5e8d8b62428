"""What a process starts with: the allocator that was chosen, or nothing that anybody tuned."""

from pathlib import Path

import pytest

from ondevice_trgl.device import start
from ondevice_trgl.device.start import patient_environment, plain_environment, tuned_environment

LIBRARY = Path("/lib/libtcmalloc_minimal.so.4")


@pytest.mark.parametrize(
    ("choice", "given", "preloaded"),
    [
        ("auto", None, str(LIBRARY)),
        ("tcmalloc", None, str(LIBRARY)),
        ("glibc", None, None),
        ("system", None, None),
        ("auto", "other.so", "other.so"),
        ("tcmalloc", "other.so", f"{LIBRARY}:other.so"),
        ("glibc", "other.so", "other.so"),
    ],
)
def test_the_allocator_is_preloaded_where_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, choice: str, given: str | None, preloaded: str | None
) -> None:
    monkeypatch.setattr(start, "tcmalloc_library", lambda: LIBRARY)
    monkeypatch.setattr(start, "allocator_name", lambda: "glibc")
    before = {"HOME": "/h"} | ({"LD_PRELOAD": given} if given else {})
    made = tuned_environment(before, choice)
    assert made.get("LD_PRELOAD") == preloaded
    assert made["HOME"] == "/h"
    assert "GOMP_SPINCOUNT" not in before


def test_a_library_that_is_not_there_is_not_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "tcmalloc_library", lambda: None)
    assert "LD_PRELOAD" not in tuned_environment({}, "tcmalloc")


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_threads_spin_briefly_unless_the_caller_says_otherwise(given: dict[str, str], spins: str | None) -> None:
    assert patient_environment(given).get("GOMP_SPINCOUNT") == spins
    assert tuned_environment(given, "system").get("GOMP_SPINCOUNT") == given.get("GOMP_SPINCOUNT")  # it looks by itself


def test_a_plain_environment_has_no_allocator_settings() -> None:
    kept = {"HOME": "/h", "OMP_NUM_THREADS": "2", "PYTHONPATH": "."}
    tuning = {"LD_PRELOAD": "x", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0", "GLIBC_TUNABLES": "glibc.x=1"}
    given = {**kept, **tuning, "TCMALLOC_RELEASE_RATE": "9", "THP_MEM_ALLOC_ENABLE": "1"}
    assert plain_environment(given) == kept
