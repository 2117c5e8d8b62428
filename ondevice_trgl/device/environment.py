"""A description of the software and hardware that a run was made on, for reports and bug reports."""

import platform
from typing import Any

import torch

from ondevice_trgl.device import container, host
from ondevice_trgl.device.allocator import allocator_name, glibc_version
from ondevice_trgl.device.limit import limit_for
from ondevice_trgl.device.meter import meter_for
from ondevice_trgl.device.tree import child_meter


def describe_environment(*, threads: int, device: str) -> dict[str, Any]:
    """JSON-ready facts; `threads` and `device` ("cpu", "cuda" or "cuda:N") are those that the run uses."""
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": device,
        "device_name": _device_name(device),
        "threads": threads,
        "allocator": allocator_name(),
        "glibc": glibc_version(),
        "platform": platform.platform(),
        "cpu": host.cpu_model(),
        "ram_bytes": host.ram_bytes(),
        "cgroup_limit_bytes": container.memory_limit_bytes(),
    }


def describe_metering(device: str) -> dict[str, Any]:
    """JSON-ready: by what memory is measured and held on `device` here, each with what it falls back to.

    Resets the peak of this process, and starts torch's threads.
    """
    with meter_for(device) as meter:
        name = meter.name
    stall = container.stall_seconds()
    return {
        "peak_meter": name,
        "budget_held_by": limit_for(torch.device(device)).name,
        "child_processes": child_meter(),
        "waiting_for_memory": "not told by this kernel" if stall is None else stall[1],
        "left_bytes": host.left_bytes(),
    }


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return host.cpu_model()
