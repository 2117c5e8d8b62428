"""A description of the software and hardware that a run was made on, for reports and bug reports."""

import platform
from typing import Any

import torch

from ondevice_trgl.device import host
from ondevice_trgl.device.allocator import allocator_name, glibc_version


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
        "cgroup_limit_bytes": host.memory_limit_bytes(),
    }


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return host.cpu_model()
