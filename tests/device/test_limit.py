"""What a refusal of memory says."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ondevice_trgl.device import allocator
from ondevice_trgl.device.limit import refused_bytes

GLIBC = sys.platform.startswith("linux") and allocator.allocator_name() == "glibc"
NOT_GLIBC = "needs glibc's own malloc"
MB = 1_000_000

# An app with a history: blocks of `size` were taken and freed, but for the last, so that the heap cannot shrink.
APP = """
import ctypes, mmap, resource
from pathlib import Path
from ondevice_trgl.device.allocator import glibc_heaps, tune
from ondevice_trgl.device.limit import DataLimit, _memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def use(size, count):
    blocks = [libc.malloc(size) for _ in range(count)]
    pin = libc.malloc(size)
    for block in blocks:
        libc.memset(block, 1, size)
        libc.free(block)

def memory():
    return _memory(Path("/proc/self"))

def room(limit, budget):
    # how much more can be taken from the system
    limit.set(budget)
    return resource.getrlimit(resource.RLIMIT_DATA)[0] - memory()["VmData"]
"""

# As many processes as are asked for by one that has imported already (2.5 s): sources in, a line each, outputs out.
ASKED = """
import os, sys
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        exec(eval(line), {})
        sys.stdout.flush()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    print(END, flush=True)
"""
END = "end of output"
RunApp = Callable[[str], str]


@pytest.fixture(scope="module")
def run_app() -> Iterator[RunApp]:
    """Runs source behind `APP` in a process of its own, of which no other has seen the heap; returns stdout."""
    command = [sys.executable, "-W", "error", "-c", APP + f"END = {END!r}\n" + ASKED]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as apps:
        assert apps.stdin is not None
        assert apps.stdout is not None
        stdin, stdout = apps.stdin, apps.stdout

        def run(source: str) -> str:
            print(repr(APP + source), file=stdin, flush=True)
            lines: list[str] = []
            for line in stdout:
                if line == f"{END}\n":
                    return "".join(lines)
                lines.append(line)
            raise AssertionError("it failed: see stderr")

        yield run


def test_how_much_was_refused_is_read_from_what_an_error_came_from() -> None:
    refused = RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 411041792 bytes. Error 12"
    )
    outer = ValueError("the model cannot be built")
    outer.__cause__ = refused
    assert refused_bytes(refused) == refused_bytes(outer) == 411_041_792
    assert refused_bytes(MemoryError()) == refused_bytes(None) == 0


@pytest.mark.skipif(not GLIBC, reason=NOT_GLIBC)
def test_what_is_free_in_the_heap_counts_as_it_can_be_used_again(run_app: RunApp) -> None:
    source = """
use(60_000, 4000)
limit, held = DataLimit(), memory()
budget = held["RssAnon"] + held["RssFile"] + 300_000_000
print(glibc_heaps().free, room(limit, budget))
"""
    free, room = map(int, run_app(source).split())
    assert free > 200 * MB, "the heap shrank: the test proves nothing"
    assert free + room <= 300 * MB


@pytest.mark.skipif(not GLIBC, reason=NOT_GLIBC)
def test_what_others_map_and_do_not_touch_costs_little_and_what_malloc_takes_all(run_app: RunApp) -> None:
    source = """
limit, budget = DataLimit(), 2_000_000_000
print(room(limit, budget))
code = mmap.mmap(-1, 100_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print(room(limit, budget))
block = libc.malloc(100_000_000)
print(room(limit, budget))
"""
    before, mapped, taken = map(int, run_app(source).split())
    assert 5 * MB < before - mapped < 25 * MB
    assert mapped - taken > 95 * MB


@pytest.mark.skipif(not GLIBC, reason=NOT_GLIBC)
@pytest.mark.parametrize(("choice", "lifted"), [("system", True), ("glibc", False)])
def test_large_blocks_stay_out_of_the_heap_while_a_limit_is_set(choice: str, lifted: bool, run_app: RunApp) -> None:
    source = f"""
tune({choice!r})
limit = DataLimit()
limit.set(4_000_000_000)
use(3_000_000, 100)
print(glibc_heaps().free)
limit.lift()
use(3_000_000, 100)
print(glibc_heaps().free)
"""
    held, after = map(int, run_app(source).split())
    assert held < 30 * MB
    assert (after > 250 * MB) == lifted


@pytest.mark.skipif(not GLIBC, reason=NOT_GLIBC)
@pytest.mark.parametrize("choice", ["system", "glibc"])
def test_small_blocks_are_had_where_the_limit_refuses_large_ones(choice: str, run_app: RunApp) -> None:
    source = f"""
tune({choice!r})
limit = DataLimit()
limit.set(1)
small = [libc.malloc(60_000) for _ in range(100)]
print(libc.malloc(3_000_000), small.count(None))
"""
    assert run_app(source).split() == ["None", "0"]


@pytest.mark.skipif(not GLIBC, reason=NOT_GLIBC)
def test_what_is_free_in_the_heap_is_not_in_use_and_what_is_in_use_cannot_be_held_below(run_app: RunApp) -> None:
    source = """
use(60_000, 4000)
limit, held = DataLimit(), memory()
used = held["RssAnon"] + held["RssFile"]  # what is free was given back
print(*(limit.can_hold(used + more * 1_000_000) for more in (100, -120)))
libc.memset(libc.malloc(200_000_000), 1, 200_000_000)
print(*(limit.can_hold(used + more * 1_000_000) for more in (100, 300)))
"""
    assert run_app(source).split() == ["True", "False", "False", "True"]


@pytest.mark.skipif(not GLIBC, reason=NOT_GLIBC)
def test_held_loose_blocks_are_taken_again_without_asking_and_held_tight_anew(run_app: RunApp) -> None:
    source = """
from ondevice_trgl.device.allocator import release_memory
limit = DataLimit()
assert limit.holds == ("loose", "firm", "tight")
limit.set(2_000_000_000)
for how in ("tight", "loose", "firm"):
    limit.hold(how)
    release_memory()
    use(12_000_000, 1)  # touches one block, and another stays until the end
    use(4_000_000, 3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    use(4_000_000, 3)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
limit.lift()
"""
    tight, loose, firm = map(int, run_app(source).split())
    assert tight > 2000, "3 blocks of 976 pages each"
    assert max(loose, firm) < 500
