"""The child process that builds a model and measures its pieces, so that no other process need hold what that takes.

What it leaves in the scratch folder: weights.safetensors, and built.json with the blueprint (null where the network has
none), the names in its state dict, and the costs. `python -m ondevice_trgl.measuring` reads a request and prints the
answer; see `child`.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ondevice_trgl.data.registry import DataBundle
from ondevice_trgl.device.allocator import release_memory, tune
from ondevice_trgl.device.limit import MemoryLimit, NoLimit, lacks_memory, limit_for
from ondevice_trgl.device.meter import PeakMeter, meter_for
from ondevice_trgl.device.pages import release_code_pages
from ondevice_trgl.errors import BudgetInfeasibleError
from ondevice_trgl.job import Job
from ondevice_trgl.model.blueprint import NoBlueprint, to_blueprint
from ondevice_trgl.model.filed import weights_in_file
from ondevice_trgl.model.partition import LocalModule
from ondevice_trgl.model.store import aliases_of, evict, state_of
from ondevice_trgl.model.tensorfile import write_tensors
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.plan.estimate import estimate
from ondevice_trgl.plan.memo import Memo, circumstances, memo_folder
from ondevice_trgl.processes import answer
from ondevice_trgl.run.batches import Source
from ondevice_trgl.run.guards import device_named
from ondevice_trgl.run.prepare import chain_of, sources
from ondevice_trgl.run.run_dir import scratch_beside
from ondevice_trgl.run.workload import build_for, load_bundle
from ondevice_trgl.units import format_size

WEIGHTS, BUILT = "weights.safetensors", "built.json"


class Lifetime(PeakMeter):
    """A meter that knows its highest peak whoever resets it. `others`: bytes that the caller holds beside it."""

    def __init__(self, meter: PeakMeter, others: int) -> None:
        self.name, self.kind = meter.name, meter.kind
        self._meter, self._others, self._before = meter, others, 0

    def reset(self) -> None:
        self._before = max(self._before, self._meter.peak_bytes())
        self._meter.reset()

    def peak_bytes(self) -> int:
        return self._meter.peak_bytes()

    def current_bytes(self) -> int:
        return self._meter.current_bytes()

    def highest_bytes(self) -> int:
        """Of this process and its caller; 0 where device memory is metered."""
        return max(self._before, self._meter.peak_bytes()) + self._others if self.kind == "rss" else 0


@dataclass(frozen=True)
class Helper:
    """What a process that sets a run up works with: inside the budget, as the run itself will be."""

    job: Job
    caller_bytes: int
    scratch: Path
    meter: Lifetime
    limit: MemoryLimit
    memo: Memo

    @property
    def budget_bytes(self) -> int:
        assert self.job.config.budget_bytes is not None
        return self.job.config.budget_bytes

    @property
    def room_bytes(self) -> int:
        """What this process may take, the caller waiting beside it."""
        return self.budget_bytes - self.caller_bytes


def as_helper(request: dict[str, Any], work: Callable[[Helper, dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """`work` in a process held to the budget. Raises BudgetInfeasibleError where it does not fit into it."""
    job = Job.from_dict(request["job"])
    tune(job.allocator)
    release_code_pages()  # what importing has touched
    if job.config.threads is not None:
        torch.set_num_threads(job.config.threads)
    with meter_for(device_named(job.config.device)) as meter:
        lifetime = Lifetime(meter, request["caller_bytes"])
        limit = limit_for(torch.device("cpu")) if meter.kind == "rss" else NoLimit()
        memo = Memo(memo_folder(), **circumstances())
        helper = Helper(job, request["caller_bytes"], Path(request["scratch"]), lifetime, limit, memo)
        limit.set(helper.room_bytes)
        try:
            result = work(helper, request)
        except Exception as error:
            if not lacks_memory(error):
                raise
            raise too_large(helper.budget_bytes, lifetime.highest_bytes()) from error
        finally:
            limit.lift()
        if lifetime.highest_bytes() > helper.budget_bytes:
            raise too_large(helper.budget_bytes, lifetime.highest_bytes())
        return {**result, "peak_bytes": lifetime.highest_bytes()}


def too_large(budget: int, peak: int) -> BudgetInfeasibleError:
    """The refusal of a budget that setting a run up does not fit into; `peak` is what was reached."""
    needed = -(-max(peak, budget) * 103 // 100 // 1_000_000) * 1_000_000
    return BudgetInfeasibleError(
        f"nothing fits the budget of {format_size(budget)}: building and planning took {format_size(peak)} and were "
        "not done",
        budget_bytes=budget,
        smallest_feasible_budget_bytes=needed,
        hint=f"the smallest feasible budget is {needed // 1_000_000}MB or more",
    )


def built(helper: Helper, bundle: DataBundle, data: dict[str, Source]) -> tuple[Any, dict[str, tuple[str, ...]], Chain]:
    """Build the network, put its weights into a file in the scratch folder and evict it.

    Returns its blueprint, None where it has none; the names in its state dict; the chain.
    """
    job, weights = helper.job, helper.scratch / WEIGHTS
    with weights_in_file(weights.parent) as filed:
        model = build_for(job.workload, bundle, job.config.seed)
        filed.take(model)
    release_code_pages()
    with filed.dropped_as_read():
        chain = chain_of(model, data)
    release_code_pages()
    record = None
    with contextlib.suppress(NoBlueprint):
        record = to_blueprint(chain)
    tensors = state_of(model)
    for index in range(len(chain.segments)):  # and the constants that forward uses
        tensors |= state_of(LocalModule.of(chain, index, index + 1))
    write_tensors(weights, tensors, written=filed.release)
    aliases = aliases_of(model)
    evict(model)
    release_memory()
    return record, aliases, chain


def _measure(helper: Helper, request: dict[str, Any]) -> dict[str, Any]:
    job = helper.job
    bundle = load_bundle(job.workload, job.config.seed, scratch_beside(job.run_dir))
    data = sources(bundle.train, bundle.val, bundle.test)
    record, aliases, chain = built(helper, bundle, data)
    release_code_pages()
    helper.limit.set(helper.room_bytes)
    costs = estimate(chain, job.config)
    answer = {"blueprint": record, "names": aliases, "costs": costs.to_dict()}
    (helper.scratch / BUILT).write_text(json.dumps(answer), encoding="utf-8")
    return {}


if __name__ == "__main__":
    raise SystemExit(answer(lambda request: as_helper(request, _measure)))
