"""What is known of the machine under us: RAM and what is left of it, processor name, usable cores."""

import os
import platform
import re
from pathlib import Path

import psutil

from ondevice_trgl.device.container import free_bytes, memory_limit_bytes
from ondevice_trgl.device.tree import process_tree_rss

_OCTAL = re.compile(r"\\([0-7]{3})")
"""In the kernel's list of mounts, a space and the like."""


def ram_bytes() -> int:
    """Physical memory."""
    return int(psutil.virtual_memory().total)


def usable_ram_bytes() -> int:
    """Physical memory, or the container's limit where that is less."""
    ram, limit = ram_bytes(), memory_limit_bytes()
    return ram if limit is None else min(ram, limit)


def left_bytes() -> int:
    """What others leave of the memory to this process and those it started: what is free, and what they hold."""
    free = int(psutil.virtual_memory().available)
    inside = free_bytes()
    return (free if inside is None else min(free, inside)) + process_tree_rss()


def is_in_ram(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether what is written into `folder` stays in RAM (tmpfs, ramfs); False where the system does not tell."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    place, kind = Path(), ""
    for _, where, found, *_ in (line.split(" ") for line in lines if line.count(" ") >= 3):
        mounted = Path(_OCTAL.sub(lambda octal: chr(int(octal[1], 8)), where))
        if folder.resolve().is_relative_to(mounted) and len(mounted.parts) >= len(place.parts):
            place, kind = mounted, found  # of two at one place the later lies on top
    return kind in ("tmpfs", "ramfs")


def cpu_count() -> int:
    """Cores that this process may run on; hyper-threads count once."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    try:
        allowed = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        allowed = physical
    return max(1, min(physical, allowed))


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name of the processor, as far as the system tells."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    for key in ("model name", "Model", "Hardware"):  # x86, Raspberry Pi, other ARM boards
        if found.get(key):
            return found[key]
    return platform.processor() or platform.machine()
