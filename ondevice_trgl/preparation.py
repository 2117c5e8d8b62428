"""The child process that makes a plan, or a whole run directory, so that the process that trains need not.

Building a model may take torchvision (84 MB), all of its weights at once, and one real pass through every segment.
`python -m ondevice_trgl.preparation` reads a request and prints the answer; see `child`.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

import ondevice_trgl.named_run  # noqa: F401 -- the process that trains has it, and the floor is measured here
from ondevice_trgl.child import answer
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
from ondevice_trgl.runtime.run_dir import RunDir
from ondevice_trgl.runtime.scheduler import Measured
from ondevice_trgl.runtime.workload import build_for, load_bundle, scratch_beside
from ondevice_trgl.units import format_size

_BARE = 10_000_000
"""RSS of a bare interpreter, which both processes hold."""
_PROGRESS_BYTES = 4_000_000
"""The live display of the caller's process, which is not loaded yet."""


def _work(request: dict[str, Any]) -> dict[str, Any]:
    job = Job.from_dict(request["job"])
    tune(job.allocator)
    if request["what"] == "create":
        RunDir.check(job.run_dir, force=job.force)
    device = device_named(job.config.device)
    if job.config.threads is not None:
        torch.set_num_threads(job.config.threads)
    with meter_for(device) as meter:
        bundle = load_bundle(job.workload, job.config.seed, scratch_beside(job.run_dir))
        release_memory()
        release_code_pages()
        # the caller will hold what this process holds now, beside what it holds already
        floor: int | None = (
            meter.current_bytes() + request["caller_bytes"] - _BARE + _PROGRESS_BYTES if meter.kind == "rss" else 0
        )
        data = sources(bundle.train, bundle.val, bundle.test)
        with tempfile.TemporaryDirectory(prefix=".trgl-", dir=scratch_beside(job.run_dir)) as folder:
            weights = Path(folder) / "weights.safetensors"
            record, aliases, chain = _built(job, bundle, data, weights)
            if chain is not None:  # the caller will build the network itself
                floor = None
            else:
                chain = from_blueprint(record)
            meter_peak = meter.peak_bytes()
            plan = make_run_plan(chain, data, job.config, meter, floor, lambda: from_blueprint(record))
            peak = max(_tree(meter, request), meter_peak + request["caller_bytes"] if meter.kind == "rss" else 0)
            if peak > plan.budget_bytes:
                raise _too_large(plan, peak)
            if floor is not None:
                chain = from_blueprint(record)  # the plan has evicted the other
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
        return {"peak_bytes": _tree(meter, request)}


def _tree(meter: PeakMeter, request: dict[str, Any]) -> int:
    """Peak of this process and its caller together; 0 where device memory is metered."""
    return int(meter.peak_bytes() + request["caller_bytes"]) if meter.kind == "rss" else 0


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


def _too_large(plan: Plan, peak: int) -> BudgetInfeasibleError:
    needed = -(-(peak + 5_000_000) // 1_000_000) * 1_000_000
    return BudgetInfeasibleError(
        f"nothing fits the budget of {format_size(plan.budget_bytes)}: training would, but building the model with all "
        f"its weights takes {format_size(peak)}",
        budget_bytes=plan.budget_bytes,
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
