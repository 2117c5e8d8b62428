"""What a session of a run looks at before it starts, and what it puts back when it ends."""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.device.allowance import Allowance
from ondevice_trgl.device.randomness import Randomness
from ondevice_trgl.errors import UsageError
from ondevice_trgl.policy import Stated, parse_budget
from ondevice_trgl.report.model import Report, read_report
from ondevice_trgl.run.batches import Source
from ondevice_trgl.run.run_dir import RunDir
from ondevice_trgl.units import parse_size


def outline(data: dict[str, Source]) -> dict[str, Any]:
    """What tells one dataset from another at the cost of its labels; JSON-ready."""
    return {
        name: {
            "samples": len(split.labels),
            "shape": list(split.shape),
            "labels": hashlib.blake2b(bytes_of(split.labels.contiguous()), digest_size=8).hexdigest(),
        }
        for name, split in data.items()
    }


def last_report(run: RunDir) -> Report | None:
    """What an earlier session of the run reported; None after a power cut."""
    return read_report(run.path) if (run.path / "report.json").is_file() else None


def device_named(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r}: torch finds no CUDA device here", hint="use --device cpu")
    return torch.device(name)


def allowed(stated: Stated, device: torch.device) -> Callable[[], int]:
    """What the budget `stated` comes to, each time it is called. Raises SizeError; UsageError for a policy on a GPU.

    A policy is of this machine's memory, and a container's limit holds there; the memory of a GPU is neither.
    """
    if device.type != "cuda":
        return Allowance(stated).now
    if callable(stated):
        return lambda: parse_size(stated(), what="budget")
    if not isinstance(parse_budget(stated), int):
        raise UsageError(f"budget {stated!r} is a share of RAM, and {device} has memory of its own", hint="state bytes")
    size = parse_size(stated, what="budget")
    return lambda: size


_AT_WORK = threading.Lock()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """No other training of this process goes on meanwhile: limits and peaks are of the process, and so is the budget.

    Raises UsageError where one does, in whatever thread.
    """
    if not _AT_WORK.acquire(blocking=False):
        raise UsageError(
            "another training or planning goes on in this process, and the budget is of the process",
            hint="wait until it has ended, pause it, or start the second one in a process of its own",
        )
    try:
        yield
    finally:
        _AT_WORK.release()


@contextlib.contextmanager
def flags_kept(model: object) -> Iterator[None]:
    """What a run freezes of `model` is frozen for the run alone; nothing where it is a callable that makes one."""
    flags = [(p, p.requires_grad) for p in model.parameters()] if isinstance(model, nn.Module) else []
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def global_state_kept(threads: int | None) -> Iterator[None]:
    """Torch's thread count and random generators as they were, whatever happens inside."""
    before: int = torch.get_num_threads()
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
    state = Randomness.now(device).torchs()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        state.restore(device)
        if threads is not None:
            torch.set_num_threads(before)
