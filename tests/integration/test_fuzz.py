"""A few hundred damaged and hostile files of every kind are opened or refused; `make bench-crash` tries more."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.asked_here import ask_here
from tests.benchmarks_loaded import benchmark

FILES = 20
"""Of each of the kinds."""


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    return benchmark("fuzz")


@pytest.fixture
def clock(fuzz: ModuleType) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, fuzz.ring)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("clock", "code_pages_kept")
def test_files_are_opened_or_refused(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "growth_of", lambda read: (fuzz.outcome_of(read), 0))  # other tests hold memory, too
    found = fuzz.kinds(tmp_path, ask_here)
    counts = {name: fuzz.fuzzed(name, kind, range(FILES), 7) for name, kind in found.items()}
    assert [name for name, count in counts.items() if count["failed"]] == [], capsys.readouterr().err
    assert sum(count["refused"] for count in counts.values()) > FILES * len(found) // 3
    for kind in found.values():
        kind.read()  # the good ones are back


def test_changes_are_the_same_again_by_their_seed(fuzz: ModuleType) -> None:
    data = b'{"a": [1, 2.5, "x", {"b": null}], "c": true}'
    made = [[fuzz.json_changed(random.Random(f"x {number}"), data) for number in range(200)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) > 100
