"""What is said of this machine: true, complete, ready for JSON, and without guessing where a file is absent."""

import json
from pathlib import Path

import psutil
import pytest
import torch

from ondevice_trgl.device import container, host
from ondevice_trgl.device.environment import describe_environment


def test_the_description_is_json_ready_and_complete() -> None:
    record = json.loads(json.dumps(describe_environment(threads=3, device="cpu")))
    assert set(record) >= {"torch", "device", "threads", "allocator", "platform"}  # report.json promises these
    assert (record["threads"], record["device"]) == (3, "cpu")
    assert record["torch"] == str(torch.__version__)
    assert record["ram_bytes"] == psutil.virtual_memory().total
    assert record["device_name"] == record["cpu"] != ""


def test_a_gpu_is_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU at {device}")
    assert describe_environment(threads=1, device="cuda:1")["device_name"] == "GPU at cuda:1"


def machine(root: Path, cgroup: str, limits: dict[str, str]) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup with these contents."""
    proc, sys = root / "proc", root / "sys"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(cgroup, encoding="utf-8")
    sys.mkdir()
    for name, text in limits.items():
        (sys / name).parent.mkdir(parents=True, exist_ok=True)
        (sys / name).write_text(text, encoding="utf-8")
    return proc, sys


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": "900000000\n"}, 900_000_000),
        ("0::/a/b\n", {"memory.max": "max\n", "a/memory.max": "700000000\n", "a/b/memory.max": "max"}, 700_000_000),
        ("0::/a/b\n", {"a/memory.max": "700000000", "a/b/memory.max": "500000000"}, 500_000_000),
        ("0::/gone\n", {"memory.max": "800000000"}, 800_000_000),
        ("0::/a\n", {"a/memory.max": "max"}, None),
        ("9:cpu:/x\n4:memory:/x\n", {"memory/x/memory.limit_in_bytes": "600000000"}, 600_000_000),
        ("4:cpu,memory:/\n0::/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("nonsense\n", {"memory.max": "1"}, None),
    ],
)
def test_container_limits(
    cgroup: str, limits: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc, sys = machine(tmp_path, cgroup, limits)
    assert container.memory_limit_bytes(proc, sys) == expected
    monkeypatch.setattr(host, "memory_limit_bytes", lambda: expected)
    monkeypatch.setattr(host, "ram_bytes", lambda: 1 << 40)
    assert host.usable_ram_bytes() == (expected or 1 << 40)


def test_no_cgroup_files_no_limit(tmp_path: Path) -> None:
    assert container.memory_limit_bytes(tmp_path / "proc", tmp_path / "sys") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nmodel name\t: Fast Chip 9\n\nprocessor\t: 1\nmodel name\t: Fast Chip 9\n", "Fast Chip 9"),
        ("processor\t: 0\nBogoMIPS\t: 108.00\n\nModel\t\t: Raspberry Pi 4 Model B\n", "Raspberry Pi 4 Model B"),
    ],
)
def test_processor_names(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    assert host.cpu_model(tmp_path / "cpuinfo") == expected


def test_without_cpuinfo_the_platform_answers(tmp_path: Path) -> None:
    assert host.cpu_model(tmp_path / "cpuinfo") != ""


def test_cores_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert host.cpu_count() == 2
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    assert host.cpu_count() == 8
