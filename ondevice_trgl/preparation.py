"""The child process that makes a plan, rehearses it and writes the run directory, from what `measuring` left behind.

It holds what the process that trains will hold, so that what a rehearsal takes here is what training takes there.
`python -m ondevice_trgl.preparation` reads a request and prints the answer; see `child`.
"""

import contextlib
import importlib
import json
from typing import Any

import torch

import ondevice_trgl.named_run  # noqa: F401 -- the process that trains has it, and the floor is measured here
from ondevice_trgl.data.registry import DataBundle
from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.device.environment import describe_environment
from ondevice_trgl.device.pages import release_code_pages
from ondevice_trgl.errors import BudgetInfeasibleError
from ondevice_trgl.job import Job
from ondevice_trgl.measuring import BUILT, WEIGHTS, Helper, as_helper, built, too_large
from ondevice_trgl.model.blueprint import from_blueprint
from ondevice_trgl.model.partition import group
from ondevice_trgl.model.store import parameter_count
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.plan.costs import Costs
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.processes import answer
from ondevice_trgl.report.model import Report
from ondevice_trgl.run import results
from ondevice_trgl.run.guards import device_named
from ondevice_trgl.run.measured import Measured
from ondevice_trgl.run.prepare import create_run, fresh_head, rehearsed_plan, sources
from ondevice_trgl.run.rehearse import Rehearsals
from ondevice_trgl.run.run_dir import scratch_beside
from ondevice_trgl.run.workload import load_bundle

_LEAN_CALLER = 30_000_000
"""RSS of a caller that holds the modules that it names, and nothing else."""
_SPARE_BYTES = 2_000_000
"""What the caller's display may grow by."""


def _prepare(helper: Helper, request: dict[str, Any]) -> dict[str, Any]:
    job = helper.job
    for name in request["modules"]:  # the caller holds them too, when it trains
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    bundle = load_bundle(job.workload, job.config.seed, scratch_beside(job.run_dir))
    data = sources(bundle.train, bundle.val, bundle.test)
    record = json.loads((helper.scratch / BUILT).read_text(encoding="utf-8"))
    aliases = {name: tuple(same) for name, same in record["names"].items()}
    blueprint = record["blueprint"]
    # without one the caller will build the network itself too, and hold what that imports
    chain = from_blueprint(blueprint) if blueprint is not None else built(helper, bundle, data)[2]
    rehearsals = Rehearsals(
        chain,
        job.config,
        helper.meter,
        helper.limit,
        helper.memo,
        room_bytes=helper.room_bytes,
        scratch=helper.scratch,
    )
    release_memory()
    release_code_pages()
    beside = _SPARE_BYTES + max(0, helper.caller_bytes - _LEAN_CALLER) if helper.meter.kind == "rss" else 0
    try:
        plan = rehearsed_plan(
            chain,
            Costs.from_dict(record["costs"]),
            data,
            job.config,
            rehearsals,
            beside_bytes=beside,
            set_up=lambda: max(request["measuring_peak_bytes"], helper.meter.highest_bytes()),
        )
    except BudgetInfeasibleError as refusal:
        if helper.meter.highest_bytes() > refusal.smallest_feasible_budget_bytes:
            raise too_large(refusal.budget_bytes, helper.meter.highest_bytes()) from refusal
        raise
    workload = _description(job, bundle)
    if request["what"] == "plan":
        return {"report": _planned(chain, plan, helper, workload).to_dict()}
    weights = helper.scratch / WEIGHTS, aliases
    create_run(job.run_dir, chain, data, job.config, plan, force=job.force, workload=workload, weights=weights)
    return {}


def _planned(chain: Chain, plan: Plan, helper: Helper, workload: dict[str, Any]) -> Report:
    partition, job = group(chain, plan.bounds), helper.job
    sizes = [parameter_count(m, fresh_head(chain, partition, job.config, k)) for k, m in enumerate(partition.modules)]
    return results.make_report(
        run_dir=None,
        config=job.config,
        plan=plan,
        names=[module.label for module in partition.modules],
        measured=[Measured(params=count) for count in sizes],
        meter=helper.meter,
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
    raise SystemExit(answer(lambda request: as_helper(request, _prepare)))
