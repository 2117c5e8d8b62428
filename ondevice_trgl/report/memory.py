"""What happened to memory while a run trained, in sentences."""

from collections.abc import Mapping
from typing import Any

from ondevice_trgl.report.model import Report
from ondevice_trgl.units import format_size

_MOST = 4
"""Sentences about single times that memory ran short."""
_NOTABLE_STALL = 0.1
_EVENTS = {
    "high": "was slowed down above memory.high",
    "oom": "ran out of memory",
    "oom_kill": "had a process killed",
}
"""Of a cgroup. Being at the limit is none: file pages fill it and are dropped again."""


def memory_notes(report: Report) -> list[str]:
    """Changes of the budget, times that memory ran short, and what the system says; nothing where all went to plan."""
    notes = []
    if len(report.budgets) > 1:
        stretches = (
            f"{format_size(one['budget_bytes'])} (peak {format_size(one['measured_peak_bytes'])})"
            for one in report.budgets
        )
        notes.append(f"the budget was changed: {', then '.join(stretches)}")
    notes += [_pressed(one) for one in report.pressure[:_MOST]]
    if len(report.pressure) > _MOST:
        notes.append(f"and {len(report.pressure) - _MOST} more times")
    notes += [str(note) for note in report.system.get("mended", ())]
    notes += _kept(report)
    for name, words in _EVENTS.items():
        if times := report.system.get("memory_events", {}).get(name, 0):
            notes.append(f"the container {words} {times} {'time' if times == 1 else 'times'}")
    notes += _on_the_gpu(report.system)
    stalled = report.system.get("stall_seconds") or 0.0
    if stalled >= _NOTABLE_STALL:
        notes.append(f"something waited for memory for {stalled:.1f} s ({report.system.get('stall_meter')})")
    return notes


def _on_the_gpu(system: Mapping[str, Any]) -> list[str]:
    """What the GPU's memory was taken by, as three see it."""
    if not (reserved := system.get("gpu_reserved_bytes")):
        return []
    allocated = format_size(system.get("gpu_allocated_bytes") or 0)
    note = f"on the GPU tensors took {allocated} of {format_size(reserved)} reserved"
    if driver := system.get("gpu_driver_bytes"):
        note += f"; the driver counts {format_size(driver)}, CUDA context included"
    return [note]


def _kept(report: Report) -> list[str]:
    """What the number format of the cache lost, where it lost anything, and where another was taken."""
    kept = [(k, one.cache_dtype, one.cache_error) for k, one in enumerate(report.modules) if one.cache_error]
    asked = report.plan.cache.dtype
    notes = [
        f"what module {k} puts out was kept in {dtype}: {asked} would have lost too much of it"
        for k, dtype, _ in kept
        if dtype != asked
    ]
    if kept:
        _, dtype, error = max(kept, key=lambda one: one[2] or 0.0)
        notes.append(f"the cache lost {100 * (error or 0.0):.2g} % of the values at most, in {dtype}")
    return notes


def _pressed(one: Mapping[str, Any]) -> str:
    place = f"module {one['module']}, epoch {one['epoch']}, step {one['step']}"
    return f"memory ran short in {place}: {one['before']} -> {one['after']} ({one['cause']})"
