"""Peak memory: what a run measures itself with. Every meter says in its name what it is.

On CPU the figure is the RSS of this whole process, interpreter and libraries included; on CUDA what torch's allocator
has reserved on the device, without the CUDA context.
"""

import contextlib
import mmap
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from ondevice_trgl.errors import TrglError, UnknownNameError

if TYPE_CHECKING:
    import torch

_PROBE_BYTES = 16 << 20
_DRIVER_SECONDS = 5.0


class PeakMeter(Protocol):
    """The highest use of memory since the last `reset`. Close it when done; closing twice is fine."""

    name: str
    kind: str
    """rss (whole process) | cuda (device memory)"""
    others: int = 0
    """What of its figures other processes hold, in bytes, as of the last `look`."""

    def look(self) -> None:
        """See what other processes hold. Between steps: peaks of theirs between two looks are missed."""
        return None

    def reset(self) -> None:
        """Start a new measurement: from now on the peak counts from the present use."""

    def peak_bytes(self) -> int:
        """Highest since the last reset, or since the meter was made."""

    def current_bytes(self) -> int:
        """Use at this moment."""

    def facts(self) -> dict[str, int]:
        """What it knows of the whole time beside the peak, by name, in bytes."""
        return {}

    def close(self) -> None:
        """Give back what the meter holds."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RssMeter(PeakMeter):
    """The kernel's own peak (VmHWM of /proc/self/status), exact without sampling. Linux.

    Resetting it resets it for everyone in the process. Raises OSError where the kernel does not reset it.
    """

    name = "VmHWM"
    kind = "rss"

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._status, self._clear = proc / "status", proc / "clear_refs"
        # some sandboxes accept the write and do nothing: see whether a known bump goes away
        with mmap.mmap(-1, _PROBE_BYTES) as block:
            for page in range(0, _PROBE_BYTES, mmap.PAGESIZE):
                block[page] = 1
        before = self.peak_bytes()
        self.reset()
        if before - self.peak_bytes() < _PROBE_BYTES // 2:
            raise OSError("writing to clear_refs does not reset VmHWM here")

    def reset(self) -> None:
        self._clear.write_text("5", encoding="ascii")

    def peak_bytes(self) -> int:
        return self._read("VmHWM:")

    def current_bytes(self) -> int:
        return self._read("VmRSS:")

    def _read(self, key: str) -> int:
        for line in self._status.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
        raise OSError(f"{self._status} has no {key.rstrip(':')}")


class SamplingRssMeter(PeakMeter):
    """RSS read every 5 ms by a thread: shorter peaks can be missed. Raises ImportError without psutil."""

    name = "sampled RSS, every 5 ms"
    kind = "rss"
    _interval = 0.005

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._lock = threading.Lock()
        self._peak = self.current_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="trgl-rss-meter", daemon=True)
        self._thread.start()

    def reset(self) -> None:
        with self._lock:
            self._peak = self.current_bytes()

    def peak_bytes(self) -> int:
        with self._lock:
            self._peak = max(self._peak, self.current_bytes())
            return self._peak

    def current_bytes(self) -> int:
        return int(self._process.memory_info().rss)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self.peak_bytes()


class MaxRssMeter(PeakMeter):
    """The highest RSS of the process's whole life: `reset` cannot lower it. Raises ImportError on Windows."""

    name = "ru_maxrss, never reset"
    kind = "rss"

    def __init__(self) -> None:
        import resource

        self._resource = resource
        self._unit = 1 if sys.platform == "darwin" else 1024

    def reset(self) -> None:
        """Does nothing: the kernel offers no way."""

    def peak_bytes(self) -> int:
        return int(self._resource.getrusage(self._resource.RUSAGE_SELF).ru_maxrss) * self._unit

    def current_bytes(self) -> int:
        """The peak, for want of a better figure."""
        return self.peak_bytes()


class CudaMeter(PeakMeter):
    """Device memory that torch's caching allocator has reserved on one GPU; the CUDA context is not in it."""

    name = "torch.cuda max_memory_reserved"
    kind = "cuda"

    def __init__(self, index: int = 0) -> None:
        import torch

        if not torch.cuda.is_available() or index >= torch.cuda.device_count():
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            raise TrglError(f"no CUDA device {index}: torch sees {count}", hint="--device cpu trains on the processor")
        self._cuda = torch.cuda
        self._index = index
        self._highest = {"gpu_allocated_bytes": 0, "gpu_reserved_bytes": 0, "gpu_driver_bytes": 0}
        self._asked = float("-inf")

    def look(self) -> None:
        """Ask the driver, every few seconds: it takes a millisecond."""
        if (now := time.monotonic()) - self._asked >= _DRIVER_SECONDS:
            self._asked = now
            self._take(gpu_driver_bytes=self.driver_bytes() or 0)

    def facts(self) -> dict[str, int]:
        """The highest that tensors took, that the allocator reserved, and that the driver was seen to count for this
        process, CUDA context included; without the last where the driver does not tell."""
        self._take(gpu_allocated_bytes=self.allocated_peak_bytes(), gpu_reserved_bytes=self.peak_bytes())
        return {name: size for name, size in self._highest.items() if size}

    def _take(self, **sizes: int) -> None:
        self._highest |= {name: max(size, self._highest[name]) for name, size in sizes.items()}

    def reset(self) -> None:
        self._take(gpu_allocated_bytes=self.allocated_peak_bytes(), gpu_reserved_bytes=self.peak_bytes())
        self._cuda.reset_peak_memory_stats(self._index)

    def peak_bytes(self) -> int:
        return int(self._cuda.max_memory_reserved(self._index))

    def current_bytes(self) -> int:
        return int(self._cuda.memory_reserved(self._index))

    def allocated_peak_bytes(self) -> int:
        """Highest that tensors took since the last reset: at most `peak_bytes`."""
        return int(self._cuda.max_memory_allocated(self._index))

    def driver_bytes(self) -> int | None:
        """What the driver (NVML) counts for this process on the device now, CUDA context included.

        None where it cannot tell: on boards whose GPU shares the system's memory, in containers that hide process ids.
        """
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # no driver, no library: NVML raises classes of its own
            return None
        try:
            handle = self._nvml_handle(pynvml)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == os.getpid() and process.usedGpuMemory is not None:
                    return int(process.usedGpuMemory)
            return None
        except pynvml.NVMLError:
            return None
        finally:
            pynvml.nvmlShutdown()

    def _nvml_handle(self, pynvml: Any) -> Any:
        # by UUID: NVML does not know of CUDA_VISIBLE_DEVICES and counts differently
        uuid = str(self._cuda.get_device_properties(self._index).uuid)
        return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")


def meter_for(device: "str | torch.device") -> PeakMeter:
    """The best meter that works here for "cpu", "cuda" or "cuda:N".

    On CPU: VmHWM, else sampling, else ru_maxrss. Raises UnknownNameError for another kind of device, TrglError where
    nothing can be measured.
    """
    kind, _, index = str(device).partition(":")
    if kind == "cuda":
        return CudaMeter(int(index or 0))
    if kind != "cpu":
        raise UnknownNameError("device", str(device), ("cpu", "cuda", "cuda:N"))
    for meter in (RssMeter, SamplingRssMeter, MaxRssMeter):
        with contextlib.suppress(OSError, ImportError):
            return meter()
    raise TrglError("no way to measure the memory of this process on this system", hint="install psutil")


def own_peak_rss(proc: Path = Path("/proc/self")) -> int:
    """Highest RSS of this process since it started, or since a meter was last reset; 0 where that cannot be told."""
    with contextlib.suppress(OSError):
        for line in (proc / "status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
