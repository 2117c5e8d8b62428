"""Whether this processor computes in bfloat16, and what a run that asks for it gets."""

from pathlib import Path

import torch

from ondevice_trgl.errors import ConfigError

_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Of x86, and of ARM, in /proc/cpuinfo."""
_CPUINFO = Path("/proc/cpuinfo")
_AMPERE = (8, 0)


def computes_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for bfloat16; others make up for them, many times slower."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _AMPERE
    try:
        words = set(_CPUINFO.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return False
    return bool(words & _FLAGS)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What forward passes on `device` compute in: bfloat16 under autocast, or None for float32 all through.

    `precision` is fp32, bf16, or auto: bf16 where the processor has it. Raises ConfigError for bf16 where it has not.
    """
    if precision == "fp32":
        return None
    if computes_bf16(device):
        return torch.bfloat16
    if precision == "auto":
        return None
    lacks = "avx512_bf16 or amx_bf16" if device.type == "cpu" else "bfloat16 (compute capability 8.0)"
    raise ConfigError(
        [f"precision = 'bf16': this {device.type} has no {lacks}; convolutions take 6 to 30 times as long as in fp32"],
        hint="leave it at fp32, or say auto: bf16 where the processor has it",
    )
