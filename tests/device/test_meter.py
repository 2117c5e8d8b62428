"""Peak meters: each sees a block that came and went, and forgets it after a reset where it can."""

import mmap
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from ondevice_trgl.device import meter
from ondevice_trgl.device.meter import CudaMeter, MaxRssMeter, PeakMeter, RssMeter, SamplingRssMeter, meter_for
from ondevice_trgl.errors import TrglError, UnknownNameError

BLOCK = 48 << 20


def touch() -> mmap.mmap:
    """`BLOCK` bytes straight from the system, every page written."""
    block = mmap.mmap(-1, BLOCK)
    for page in range(0, BLOCK, mmap.PAGESIZE):
        block[page] = 1
    return block


@pytest.fixture
def hwm() -> Iterator[RssMeter]:
    try:
        made = RssMeter()
    except OSError as error:
        pytest.skip(f"no VmHWM that can be reset: {error}")
    with made:
        yield made


def test_vm_hwm_sees_a_peak_that_is_over_and_forgets_it_on_reset(hwm: RssMeter) -> None:
    hwm.reset()
    before = hwm.current_bytes()
    touch().close()
    assert hwm.peak_bytes() - before >= 0.9 * BLOCK
    assert hwm.current_bytes() < hwm.peak_bytes()
    hwm.reset()
    assert hwm.peak_bytes() - before < 0.5 * BLOCK


def test_vm_hwm_counts_the_whole_process(hwm: RssMeter) -> None:
    assert hwm.current_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    assert hwm.peak_bytes() >= 0.95 * hwm.current_bytes()


def test_a_kernel_that_ignores_the_reset_is_found_out(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("VmHWM:\t  90000 kB\nVmRSS:\t  80000 kB\n", encoding="utf-8")
    with pytest.raises(OSError, match="does not reset"):
        RssMeter(tmp_path)


def test_a_status_without_the_figure_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\n", encoding="utf-8")
    with pytest.raises(OSError, match="VmHWM"):
        RssMeter(tmp_path)


def test_sampling_keeps_the_highest_it_saw() -> None:
    with SamplingRssMeter() as sampled:
        before = sampled.current_bytes()
        block = touch()
        assert sampled.peak_bytes() - before >= 0.9 * BLOCK
        block.close()
        assert sampled.peak_bytes() - before >= 0.9 * BLOCK
        sampled.reset()
        assert sampled.peak_bytes() - before < 0.5 * BLOCK
        assert "sampled" in sampled.name
    assert not sampled._thread.is_alive()
    sampled.close()


def test_sampling_sees_peaks_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with SamplingRssMeter() as sampled:
        asked = threading.Semaphore(0)
        monkeypatch.setattr(sampled, "peak_bytes", asked.release)
        for _ in range(3):  # the thread of the meter is the only caller
            assert asked.acquire(timeout=60)


def test_max_rss_says_that_it_is_never_reset() -> None:
    meter = MaxRssMeter()
    meter.reset()
    unit = 1 if sys.platform == "darwin" else 1024
    assert meter.peak_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert meter.current_bytes() == meter.peak_bytes()
    assert "never reset" in meter.name


def test_meter_for_cpu_measures_the_process() -> None:
    with meter_for("cpu") as chosen:
        assert chosen.kind == "rss"
        assert chosen.peak_bytes() > 10 << 20


@pytest.mark.parametrize(
    ("broken", "expected"),
    [((), RssMeter), (("RssMeter",), SamplingRssMeter), (("RssMeter", "SamplingRssMeter"), MaxRssMeter)],
)
def test_meter_for_falls_back(
    broken: tuple[str, ...], expected: type[PeakMeter], hwm: RssMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in broken:
        monkeypatch.setattr(getattr(meter, name), "__init__", _refuse)
    with meter_for("cpu") as chosen:
        assert type(chosen) is expected


def test_without_any_meter_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RssMeter", "SamplingRssMeter", "MaxRssMeter"):
        monkeypatch.setattr(getattr(meter, name), "__init__", _refuse)
    with pytest.raises(TrglError, match="no way to measure"):
        meter_for("cpu")


def _refuse(self: object) -> None:
    raise OSError("not here")


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="tpu"):
        meter_for("tpu")


# A GPU is played by a stand-in for torch.cuda and for NVML: what is tested is which figures are read and how they map.


class FakeCuda:
    def __init__(self) -> None:
        self.reset: list[int] = []

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def reset_peak_memory_stats(self, index: int) -> None:
        self.reset.append(index)

    def max_memory_reserved(self, index: int) -> int:
        return 300 + index

    def memory_reserved(self, index: int) -> int:
        return 200 + index

    def max_memory_allocated(self, index: int) -> int:
        return 100 + index

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(uuid=f"0000-{index}")


class FakeNvml:
    class NVMLError(Exception):
        pass

    def __init__(self, *processes: tuple[int, int | None]) -> None:
        self.processes = processes
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802  # NVML's own name
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-0000-1":
            raise self.NVMLError(uuid)
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    import torch

    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    return fake


def test_cuda_meter_reads_reserved_bytes_of_its_device(cuda: FakeCuda) -> None:
    made = meter_for("cuda:1")
    assert isinstance(made, CudaMeter)
    made.reset()
    figures = made.peak_bytes(), made.current_bytes(), made.allocated_peak_bytes()
    assert (made.kind, cuda.reset, figures) == ("cuda", [1], (301, 201, 101))
    assert meter_for("cuda").peak_bytes() == 300


def test_a_cuda_device_that_is_not_there_is_refused(cuda: FakeCuda) -> None:
    with pytest.raises(TrglError, match=r"no CUDA device 2: torch sees 2.*\n.*--device cpu"):
        meter_for("cuda:2")


@pytest.mark.parametrize(("processes", "expected"), [([("me", 900)], 900), ([("me", None)], None), ([(1, 5)], None)])
def test_the_driver_counts_this_process_alone(
    processes: list[tuple[Any, int | None]],
    expected: int | None,
    cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import os

    nvml = FakeNvml((999_999_999, 7), *((os.getpid() if pid == "me" else pid, used) for pid, used in processes))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert CudaMeter(1).driver_bytes() == expected
    assert CudaMeter(0).driver_bytes() is None  # NVML does not know that device
    assert nvml.open == 0


def test_without_a_driver_there_is_no_cross_check(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert CudaMeter(0).driver_bytes() is None


def test_of_a_gpu_the_highest_of_the_whole_time_is_told(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    figures = {"max_memory_reserved": 300, "max_memory_allocated": 100}
    for name in figures:
        monkeypatch.setattr(cuda, name, lambda index, name=name: figures[name])
    meter = CudaMeter(1)

    def driver_bytes() -> int:
        asked.append(1)
        return 900

    monkeypatch.setattr(meter, "driver_bytes", driver_bytes)
    assert meter.facts() == {"gpu_allocated_bytes": 100, "gpu_reserved_bytes": 300}
    for _ in range(3):
        meter.look()
    assert len(asked) == 1, "the driver takes its time"
    figures |= {"max_memory_reserved": 800, "max_memory_allocated": 700}
    meter.reset()
    figures |= {"max_memory_reserved": 200, "max_memory_allocated": 100}
    assert meter.peak_bytes() == 200
    assert meter.facts() == {"gpu_allocated_bytes": 700, "gpu_reserved_bytes": 800, "gpu_driver_bytes": 900}
