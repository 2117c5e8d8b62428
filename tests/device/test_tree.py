"""Child processes count: by the pages that they share with nobody."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ondevice_trgl.device.meter import PeakMeter
from ondevice_trgl.device.tree import TreeMeter, child_meter, descendants_bytes, process_tree_rss

BLOCK = 48 << 20


@contextmanager
def child_holding(size: int) -> Iterator[None]:
    source = f"b = bytearray({size}); b[::4096] = b'x' * len(b[::4096]); print('up', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            yield
        finally:
            child.communicate(b"\n")


class Still(PeakMeter):
    name, kind = "still", "rss"

    def reset(self) -> None: ...

    def peak_bytes(self) -> int:
        return 1000

    def current_bytes(self) -> int:
        return 900


def test_the_process_tree_holds_its_children() -> None:
    before, inside = process_tree_rss(), descendants_bytes()
    with child_holding(BLOCK):
        grown, grown_inside = process_tree_rss(), descendants_bytes()
    assert grown - before >= 0.9 * BLOCK
    assert 0.9 * BLOCK <= grown_inside - inside <= BLOCK + (32 << 20)
    assert process_tree_rss() < grown


def test_without_smaps_the_rss_of_children_counts(tmp_path: Path) -> None:
    with child_holding(BLOCK):
        assert descendants_bytes(tmp_path) >= BLOCK
    assert child_meter(tmp_path).startswith("RSS")


def test_the_meter_adds_what_children_held_at_its_looks_and_says_so() -> None:
    meter = TreeMeter(Still())
    meter.look()
    assert (meter.name, meter.peak_bytes(), meter.current_bytes(), meter.others) == ("still", 1000, 900, 0)
    with child_holding(BLOCK):
        meter.look()
        others = meter.others
        assert meter.current_bytes() == 900 + others >= 900 + 0.9 * BLOCK
    meter.look()
    assert meter.current_bytes() == 900
    assert meter.peak_bytes() == 1000 + others
    assert meter.name == "still, child processes between steps"
    meter.reset()
    assert meter.peak_bytes() == 1000
