"""Memory cgroups of both versions, read from a /proc and a /sys/fs/cgroup made for it."""

from pathlib import Path

import pytest

from ondevice_trgl.device import container

V2, V1 = "0::/app\n", "4:memory:/app\n"


def machine(root: Path, cgroup: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root / "proc", root / "sys"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"app/memory.max": "900", "app/memory.high": "700"}, 700),  # above it everything is slowed down
        ({"app/memory.max": "900", "app/memory.high": "max"}, 900),
        ({"app/memory.max": "max", "memory.high": "800"}, 800),
        ({"app/memory.max": "max"}, None),
    ],
)
def test_memory_high_is_a_limit_too(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    found = machine(tmp_path, V2, {f"sys/{name}": text for name, text in files.items()})
    assert container.memory_limit_bytes(*found) == expected


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        (V2, {"app/memory.max": "1000", "app/memory.current": "700"}, 300),
        (
            V2,
            {
                "app/memory.max": "1000",
                "app/memory.current": "900",
                "app/memory.stat": "anon 500\nfile 400\ninactive_file 300\nactive_file 50\n",
            },
            450,
        ),
        (V2, {"app/memory.max": "1000", "app/memory.current": "1200"}, 0),
        (V2, {"app/memory.max": "max", "app/memory.current": "1200"}, None),
        (V2, {"memory.max": "500", "memory.current": "450", "app/memory.max": "400", "app/memory.current": "10"}, 50),
        (
            V1,
            {
                "memory/app/memory.limit_in_bytes": "1000",
                "memory/app/memory.usage_in_bytes": "900",
                "memory/app/memory.stat": "inactive_file 1\ntotal_rss 500\ntotal_inactive_file 300\n",
            },
            400,
        ),
    ],
)
def test_what_is_free_inside(cgroup: str, files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    found = machine(tmp_path, cgroup, {f"sys/{name}": text for name, text in files.items()})
    assert container.free_bytes(*found) == expected


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        (
            V2,
            {"app/memory.events": "low 9\nhigh 3\nmax 2\noom 1\noom_kill 0\n"},
            {"high": 3, "max": 2, "oom": 1, "oom_kill": 0},
        ),
        (
            V1,
            {"memory/app/memory.failcnt": "7\n", "memory/app/memory.oom_control": "under_oom 0\noom_kill 2\n"},
            {"max": 7, "oom_kill": 2},
        ),
        (V1, {"memory/app/memory.failcnt": "7\n"}, {"max": 7}),
        (V2, {}, {}),
    ],
)
def test_events(cgroup: str, files: dict[str, str], expected: dict[str, int], tmp_path: Path) -> None:
    found = machine(tmp_path, cgroup, {f"sys/{name}": text for name, text in files.items()})
    assert container.memory_events(*found) == expected


PRESSURE = "some avg10=0.00 avg60=0.00 avg300=0.00 total=2500000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=9\n"


def test_waiting_is_read_from_the_group_or_from_the_machine_or_not_told(tmp_path: Path) -> None:
    alone = machine(tmp_path / "a", V2, {"sys/app/memory.max": "max"})
    assert container.stall_seconds(*alone) is None
    whole = machine(tmp_path / "b", V2, {"sys/app/memory.max": "max", "proc/pressure/memory": PRESSURE})
    assert container.stall_seconds(*whole) == (2.5, str(tmp_path / "b/proc/pressure/memory"))
    group = machine(tmp_path / "c", V2, {"sys/app/memory.pressure": PRESSURE, "proc/pressure/memory": "some total=1"})
    assert container.stall_seconds(*group) == (2.5, str(tmp_path / "c/sys/app/memory.pressure"))


def test_no_cgroup_at_all(tmp_path: Path) -> None:
    nowhere = tmp_path / "proc", tmp_path / "sys"
    assert container.memory_limit_bytes(*nowhere) is None
    assert container.free_bytes(*nowhere) is None
    assert container.memory_events(*nowhere) == {}


def test_what_is_counted_since() -> None:
    watch = container.Watch()
    touched = bytearray(64 << 20)
    watched = watch.since()
    assert watched.pop("page_faults") > 10, "16 000 pages, or 32 huge ones"
    del touched
    assert set(watched) == {"memory_events", "stall_seconds", "stall_meter"}
    assert all(count >= 0 for count in watched["memory_events"].values())
