"""Plan: what was staged in a folder, and a budget, become plan.json: planned by estimate, rehearsed, planned again."""

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ondevice_trgl.named  # noqa: F401 -- the process that trains has it, and the floor is measured here
from ondevice_trgl.data.preprocessing import Preprocessing
from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.device.environment import describe_environment
from ondevice_trgl.device.host import is_in_ram, left_bytes
from ondevice_trgl.device.meter import PeakMeter
from ondevice_trgl.device.pages import release_code_pages
from ondevice_trgl.device.randomness import with_numpys
from ondevice_trgl.model.blueprint import from_blueprint
from ondevice_trgl.model.partition import group
from ondevice_trgl.model.store import evict, parameter_count
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.plan.costs import Costs
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.plan.planner import LEAST_SCRATCH, SCRATCH, make_plan
from ondevice_trgl.plan.writes import write_bytes
from ondevice_trgl.processes import answer
from ondevice_trgl.report.model import Report
from ondevice_trgl.run import results
from ondevice_trgl.run.guards import device_named
from ondevice_trgl.run.measured import Measured
from ondevice_trgl.run.opening import fresh_head, sources
from ondevice_trgl.run.record import RunRecord
from ondevice_trgl.run.run_dir import BLUEPRINT, COSTS, PARTITION, PLAN, RECORD, REPORT, read_json
from ondevice_trgl.setup.helper import Helper, as_helper, stated_budget
from ondevice_trgl.setup.loosen import loosened
from ondevice_trgl.setup.rehearse import Rehearsals
from ondevice_trgl.setup.requests import PlanRequest
from ondevice_trgl.setup.staging import built, measure
from ondevice_trgl.tasks import AUTO, CLASSES
from ondevice_trgl.trgl.task import Task
from ondevice_trgl.workload import build_for, load_bundle

STEPS_OF_AN_APP = 3
"""Rehearsed for a process that an app shares: its allocator is its own."""
_MOST_PLANS = 12
"""Plans that are rehearsed before one is taken as it is; each teaches something."""
_LEAN_CALLER = 30_000_000
"""RSS of a caller that holds the modules that it names, and nothing else."""
_PINNED_SHARE = 4
"""Of what RAM is left beside a GPU, the part that a cache may be pinned in unless it is said where to keep it."""
_SPARE_BYTES = 2_000_000
"""What the caller's display may grow by."""


def plan_staged(
    folder: Path,
    chain: Chain,
    record: RunRecord,
    rehearsals: Rehearsals,
    *,
    floor_bytes: int,
    set_up: Callable[[], int] = lambda: 0,
) -> Plan:
    """Write plan.json and partition.json into `folder`, for a process that holds `floor_bytes` before it trains.

    `set_up()` is what setting the run up took at most so far. Raises BudgetInfeasibleError,
    PartitionError, ConfigError.
    """
    costs, rows = (
        Costs.from_dict(read_json(folder / COSTS)),
        {name: split["samples"] for name, split in record.data.items()},
    )

    in_ram = record.config.cache != "memory" and is_in_ram(Path(record.config.cache_dir or folder))
    cached = sum(rows.values()) + (record.config.view_count - 1) * rows["train"]

    def plan(*, pareto: bool = False) -> Plan:
        return make_plan(
            chain,
            costs,
            record.config,
            budget_bytes=stated_budget(record.config),
            floor_bytes=floor_bytes,
            rows=cached,
            train_rows=rows["train"],
            val_rows=rows.get("val", 0),
            measured=rehearsals.above,
            scratch=LEAST_SCRATCH if rehearsals.possible or rehearsals.scale != 1.0 else SCRATCH,
            scale=rehearsals.scale,
            set_up_bytes=set_up(),
            pareto=pareto,
            pinned_bytes=left_bytes() // _PINNED_SHARE if rehearsals.on_gpu else None,
            disk_is_ram=in_ram,
        )

    for _ in range(_MOST_PLANS):
        if rehearsals.of(plan(), costs):
            break
    chosen = plan(pareto=True)
    if record.config.enforce and rehearsals.possible:
        chosen = loosened(chosen, costs, rehearsals)
    written = write_bytes(chosen, chain, costs, record.config, rows=cached, train_rows=rows["train"])
    chosen = dataclasses.replace(chosen, write_bytes=written)
    if record.why_budget:
        chosen = dataclasses.replace(chosen, reasons=(record.why_budget, *chosen.reasons))
    if left := record.subject.get("weights_left"):
        chosen = dataclasses.replace(chosen, reasons=(*chosen.reasons, left))
    if in_ram and chosen.cache_tier == "disk":
        note = "that folder is RAM, not a disk: two boundaries are counted; --cache-dir puts them elsewhere"
        chosen = dataclasses.replace(chosen, reasons=(*chosen.reasons, note))
    if (kind := Preprocessing.kind_in(record.preprocessing)) != CLASSES and record.config.task == AUTO:
        note = f"task {kind}, as the data have float targets, {chain.num_outputs} a sample; --task says otherwise"
        chosen = dataclasses.replace(chosen, reasons=(*chosen.reasons, note))
    if record.no_blueprint:
        note = f"the network's own code runs in the process that trains, which holds that too: {record.no_blueprint}"
        chosen = dataclasses.replace(chosen, reasons=(*chosen.reasons, note))
    _write(folder / PLAN, chosen.to_dict())
    _write(folder / PARTITION, group(chain, chosen.bounds).to_dict())
    return chosen


def rehearsed_task(record: RunRecord, chain: Chain) -> Task:
    """The task of a run, without a metric of the user's: noise is not judged by that."""
    return Task(Preprocessing.kind_in(record.preprocessing), chain.num_outputs)


def planned_report(chain: Chain, plan: Plan, record: RunRecord, meter: PeakMeter) -> Report:
    """The report of a run that has not begun."""
    partition, config = group(chain, plan.bounds), record.config
    known = [
        Measured(
            params=parameter_count(module, fresh_head(chain, partition, config, k)),
            frozen=module.frozen,
            passed=module.passed,
        )
        for k, module in enumerate(partition.modules)
    ]
    return results.make_report(
        run_dir=None,
        config=config,
        plan=plan,
        names=[module.label for module in partition.modules],
        measured=known,
        meter=meter,
        status="planned",
        environment=describe_environment(threads=torch.get_num_threads(), device=str(device_named(config.device))),
        workload=record.reported,
        preprocessing=record.preprocessing,
        flash_endurance_bytes=record.flash_endurance_bytes,
    )


def _plan(request: PlanRequest) -> dict[str, Any]:
    record = RunRecord.from_dict(read_json(request.folder / RECORD))

    def work(helper: Helper) -> None:
        for name in request.caller_modules:  # the caller holds them too, when it trains
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        held, chain = _as_held(record, helper)
        if not (request.folder / COSTS).is_file():
            measure(chain, record.config, request.folder)
        rehearsals = Rehearsals(
            chain,
            record.config,
            helper.meter,
            helper.limit,
            helper.memo,
            rehearsed_task(record, chain),
            room_bytes=helper.room_bytes,
            scratch=request.folder,
            steps=1 if record.workload is not None and helper.meter.kind == "rss" else STEPS_OF_AN_APP,
        )
        release_memory()
        release_code_pages()
        floor = request.floor_bytes
        if helper.meter.kind != "rss":
            floor = max(floor or 0, rehearsals.floor_bytes)
        elif floor is None:
            floor = rehearsals.floor_bytes + _SPARE_BYTES + max(0, helper.caller_bytes - _LEAN_CALLER)
        with contextlib.closing(rehearsals):
            plan = plan_staged(
                request.folder,
                chain,
                record,
                rehearsals,
                floor_bytes=floor,
                set_up=lambda: (
                    max(request.set_up_bytes, helper.meter.highest_bytes()) if helper.meter.kind == "rss" else 0
                ),
            )
        report = planned_report(chain, plan, record, helper.meter)
        _write(request.folder / REPORT, report.to_dict())
        del held

    return vars(as_helper(record.config, request.folder, request.caller_bytes, record.allocator, work))


def _as_held(record: RunRecord, helper: Helper) -> tuple[Any, Chain]:
    """Data and chain as the process that trains will hold them; a program's own data it holds itself."""
    blueprint = helper.folder / BLUEPRINT
    if record.workload is None:
        return None, from_blueprint(read_json(blueprint))
    task = record.config.asked_task
    bundle = load_bundle(record.workload, record.config.seed, helper.folder.parent, task=task)
    data = sources(bundle.train, bundle.val, bundle.test)
    if blueprint.is_file():
        return data, from_blueprint(read_json(blueprint))
    # without one the caller will build the network itself too, and hold what that imports
    with_numpys()
    workload = record.workload
    with built(
        lambda: build_for(workload, bundle, record.config.seed), data, helper.folder, record.config, proof=False
    ) as (chain, _):
        evict(chain.model)
    return data, chain


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(answer(lambda values: _plan(PlanRequest.from_dict(values))))
