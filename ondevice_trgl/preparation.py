"""The child process that makes a plan, or a whole run directory, so that the process that trains need not.

Building a model may take torchvision, all of its weights at once, and one real pass through every segment.
`python -m ondevice_trgl.preparation` reads a request and prints the answer; see `child`.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ondevice_trgl.named_run  # noqa: F401 -- the process that trains has it, and the floor is measured here
from ondevice_trgl.child import answer
from ondevice_trgl.config import TrainConfig
from ondevice_trgl.data.registry import DataBundle
from ondevice_trgl.device.allocator import release_memory, tune
from ondevice_trgl.device.environment import describe_environment
from ondevice_trgl.device.meter import PeakMeter, meter_for
from ondevice_trgl.device.pages import release_code_pages
from ondevice_trgl.errors import BudgetInfeasibleError
from ondevice_trgl.job import Job
from ondevice_trgl.model.blueprint import NoBlueprint, from_blueprint, to_blueprint
from ondevice_trgl.model.partition import group
from ondevice_trgl.model.store import aliases_of, evict, state_of
from ondevice_trgl.model.tensorfile import write_tensors
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.plan.planner import Plan
from ondevice_trgl.report.model import Report
from ondevice_trgl.runtime import results
from ondevice_trgl.runtime.batches import Source
from ondevice_trgl.runtime.guards import device_named, size
from ondevice_trgl.runtime.prepare import chain_of, create_run, fresh_head, make_run_plan, sources
from ondevice_trgl.runtime.run_dir import scratch_beside
from ondevice_trgl.runtime.scheduler import Measured
from ondevice_trgl.runtime.workload import build_for, load_bundle
from ondevice_trgl.units import format_size

_BARE = 10_000_000
"""RSS of a bare interpreter, which both processes hold."""
_PROGRESS_BYTES = 4_000_000
"""The live display of the caller's process, which is not loaded yet."""
_MOST_TRIES = 4
"""Budgets that are tried before one is named as the smallest."""


class _Lifetime(PeakMeter):
    """A meter that knows its highest peak whoever resets it."""

    def __init__(self, meter: PeakMeter, others: int, built: int) -> None:
        self.name, self.kind = meter.name, meter.kind
        self._meter, self._others, self._built, self._before = meter, others, built, 0

    def reset(self) -> None:
        self._before = max(self._before, self._meter.peak_bytes())
        self._meter.reset()

    def peak_bytes(self) -> int:
        return self._meter.peak_bytes()

    def current_bytes(self) -> int:
        return self._meter.current_bytes()

    def highest_bytes(self) -> int:
        """Of this process and its caller, which holds `others` bytes; 0 where device memory is metered.

        `built` is the peak of the process that built the model, where that was another.
        """
        if self.kind != "rss":
            return 0
        return max(self._built, max(self._before, self._meter.peak_bytes()) + self._others)


def _work(request: dict[str, Any]) -> dict[str, Any]:
    job = Job.from_dict(request["job"])
    tune(job.allocator)
    release_code_pages()  # what importing has touched
    device = device_named(job.config.device)
    if job.config.threads is not None:
        torch.set_num_threads(job.config.threads)
    with meter_for(device) as device_meter:
        meter = _Lifetime(device_meter, request["caller_bytes"], request.get("built_peak_bytes", 0))
        bundle = load_bundle(job.workload, job.config.seed, scratch_beside(job.run_dir))
        release_memory()
        release_code_pages()
        # the caller will hold what this process holds now, beside what it holds already
        floor: int | None = (
            meter.current_bytes() + request["caller_bytes"] - _BARE + _PROGRESS_BYTES if meter.kind == "rss" else 0
        )
        data = sources(bundle.train, bundle.val, bundle.test)
        scratch = Path(request["scratch"])
        weights, staged = scratch / "weights.safetensors", scratch / "built.json"
        if staged.is_file():
            built = json.loads(staged.read_text(encoding="utf-8"))
            record, aliases, chain = built["blueprint"], {n: tuple(same) for n, same in built["names"].items()}, None
        else:
            record, aliases, chain = _built(job, bundle, data, weights)
        if request["what"] == "build":
            if chain is None:
                staged.write_text(json.dumps({"blueprint": record, "names": aliases}), encoding="utf-8")
            return {"peak_bytes": meter.highest_bytes()}
        if chain is not None:  # the caller will build the network itself
            floor = None

        def plan_within(config: TrainConfig) -> Plan:
            plan = make_run_plan(
                chain or from_blueprint(record), data, config, meter, floor, lambda: from_blueprint(record)
            )
            if meter.highest_bytes() > plan.budget_bytes:
                raise _too_large(plan.budget_bytes, meter.highest_bytes(), "training would, but ")
            return plan

        try:
            plan = plan_within(job.config)
        except BudgetInfeasibleError as refusal:
            raise _tried(refusal, plan_within, job.config, meter) from refusal
        chain = chain or from_blueprint(record)  # not one that planning has evicted
        workload = _description(job, bundle)
        if request["what"] == "plan":
            return {"report": _planned(chain, plan, job, meter, workload).to_dict()}
        create_run(
            job.run_dir,
            chain,
            data,
            job.config,
            plan,
            force=job.force,
            workload=workload,
            weights=None if floor is None else (weights, aliases),
        )
        return {"peak_bytes": meter.highest_bytes()}


def _built(
    job: Job, bundle: DataBundle, data: dict[str, Source], weights: Path
) -> tuple[dict[str, Any], dict[str, tuple[str, ...]], Chain | None]:
    """Build the network and put its weights into the file `weights`: (blueprint, names in its state dict, None).

    The network is gone afterwards. Where it has no blueprint, it is kept, and returned as the last.
    """
    model = build_for(job.workload, bundle, job.config.seed)
    release_code_pages()
    chain = chain_of(model, data)
    release_code_pages()
    try:
        record = to_blueprint(chain)
    except NoBlueprint:
        return {}, {}, chain
    write_tensors(weights, state_of(model))
    aliases = aliases_of(model)
    evict(model)
    release_memory()
    return record, aliases, None


def _tried(
    refusal: BudgetInfeasibleError, plan_within: Callable[[TrainConfig], Plan], config: TrainConfig, meter: _Lifetime
) -> BudgetInfeasibleError:
    """`refusal` with a budget that has been tried: with more room more is probed, and that may show another need."""
    first = needed = refusal.smallest_feasible_budget_bytes
    set_up = _too_large(refusal.budget_bytes, meter.highest_bytes())
    for _ in range(_MOST_TRIES):
        if meter.highest_bytes() > needed:
            set_up = _too_large(refusal.budget_bytes, meter.highest_bytes())
            needed = set_up.smallest_feasible_budget_bytes
        try:
            plan_within(dataclasses.replace(config, budget=needed))
            break
        except BudgetInfeasibleError as more:
            needed = max(needed, more.smallest_feasible_budget_bytes)
    if needed == first:
        return refusal
    return BudgetInfeasibleError(
        set_up.message if meter.highest_bytes() > first else refusal.message,
        budget_bytes=refusal.budget_bytes,
        smallest_feasible_budget_bytes=needed,
        hint=f"the smallest feasible budget is {needed // 1_000_000}MB",
    )


def _too_large(budget: int, peak: int, but: str = "") -> BudgetInfeasibleError:
    needed = -(-(peak + 5_000_000) // 1_000_000) * 1_000_000
    return BudgetInfeasibleError(
        f"nothing fits the budget of {format_size(budget)}: {but}building the model with all its weights takes "
        f"{format_size(peak)}",
        budget_bytes=budget,
        smallest_feasible_budget_bytes=needed,
        hint=f"the smallest feasible budget is {needed // 1_000_000}MB",
    )


def _planned(chain: Chain, plan: Plan, job: Job, meter: PeakMeter, workload: dict[str, Any]) -> Report:
    partition = group(chain, plan.bounds)
    sizes = [size(m, fresh_head(chain, partition, job.config, k)) for k, m in enumerate(partition.modules)]
    return results.make_report(
        run_dir=None,
        config=job.config,
        plan=plan,
        names=[module.label for module in partition.modules],
        measured=[Measured(params=count) for count in sizes],
        meter=meter,
        status="planned",
        environment=describe_environment(threads=torch.get_num_threads(), device=str(device_named(job.config.device))),
        workload=workload,
    )


def _description(job: Job, data: DataBundle) -> dict[str, Any]:
    return {
        **job.workload.to_dict(),
        "description": data.description,
        "digest": data.digest,
        "input_shape": list(data.input_shape),
        "num_classes": data.num_classes,
        "samples": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        "seed": job.config.seed,
        "baseline": job.baseline,
        "command": job.command,
        "allocator": job.allocator,
    }


if __name__ == "__main__":
    raise SystemExit(answer(_work))
