"""Why a plan is as it is, and why there is none: the sentences that people read."""

import dataclasses
from collections.abc import Sequence

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import BudgetInfeasibleError
from ondevice_trgl.imported import name_of
from ondevice_trgl.model.norms import Norm
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.plan.plan import Plan, Rung
from ondevice_trgl.units import format_size

_CLASSIFIER = "the network's own classifier comes last, trained on what the modules put out as one more head"
_FRONT = "the frozen front is {}, passed through once a lap without an auxiliary head; what it puts out is cached"
_INEXACT = "BatchNorm then sees micro-batches, so results differ a little from the full batch"


def reasons_for(plan: Plan, config: TrainConfig, train_rows: int, *, exact: bool) -> Plan:
    """`plan` with a reason for each of its choices. `exact`: accumulating gradients changes nothing in the result."""
    reasons = [*_batch(plan, config, train_rows), *_modules(plan, config), *_end_to_end(plan)]
    reasons += [*_micro_batches(plan, config, exact=exact), *_checkpointing(plan)]
    reasons += [*_spilling(plan), *_cache(plan, config), *_views(config)]
    return dataclasses.replace(plan, reasons=tuple(reasons))


def _batch(plan: Plan, config: TrainConfig, train_rows: int) -> list[str]:
    if plan.batch_size == config.batch_size:
        return []
    return [f"batch size {plan.batch_size}: there are only {train_rows} training samples"]


def _modules(plan: Plan, config: TrainConfig) -> list[str]:
    count, budget = plan.num_modules - plan.passed, format_size(plan.budget_bytes)
    tail = [_CLASSIFIER] if plan.classifier else []
    if plan.passed:
        tail.insert(0, _FRONT.format("one module" if plan.passed == 1 else f"{plan.passed} modules"))
    if not count:
        return tail
    modules = "1 module" if count == 1 else f"{count} modules"
    if config.modules != "auto":
        return [f"{modules}{' behind the frozen front' if plan.passed else ''}, as asked", *tail]
    if plan.micro_batch_size == plan.batch_size and not (plan.checkpointed or plan.spilled):
        return [f"{modules}: the fewest that fit {budget} at the full batch of {plan.batch_size}", *tail]
    return [f"{modules}: at the full batch of {plan.batch_size} no number of modules fits {budget}", *tail]


def _end_to_end(plan: Plan) -> list[str]:
    if plan.end_to_end_bytes > plan.budget_bytes or plan.num_parts == 1:
        return []
    return [
        f"end-to-end would fit in the budget (predicted {format_size(plan.end_to_end_bytes)}); "
        "--modules 1 trains that way, more modules leave memory to the rest of the device"
    ]


def _micro_batches(plan: Plan, config: TrainConfig, *, exact: bool) -> list[str]:
    small = [k for k, rung in enumerate(plan.rungs) if rung.micro_batch_size < plan.batch_size and k >= plan.passed]
    if not small:
        return []
    if config.micro_batch == plan.micro_batch_size:
        return [f"micro-batch {plan.micro_batch_size}, as asked" + ("" if exact else f"; {_INEXACT}")]
    if isinstance(config.micro_batch, int):
        return [
            f"micro-batch {plan.micro_batch_size}: of at most {config.micro_batch}, the largest that divides "
            f"{plan.batch_size}"
        ]
    sizes = ", ".join(f"{plan.rungs[k].micro_batch_size} in module {k}" for k in small)
    result = "without BatchNorm the gradients are those of the full batch" if exact else _INEXACT
    return [f"micro-batches, accumulated to {plan.batch_size}: {sizes}; {result}"]


def _checkpointing(plan: Plan) -> list[str]:
    modules = [str(k) for k, rung in enumerate(plan.rungs) if rung.checkpointed]
    if not modules:
        return []
    return [
        f"activation checkpointing in module {', '.join(modules)}: same results, the forward pass is computed twice"
    ]


def _spilling(plan: Plan) -> list[str]:
    modules = [str(k) for k, rung in enumerate(plan.rungs) if rung.spilled]
    if not modules:
        return []
    return [
        f"gradients and optimizer state on disk in module {', '.join(modules)}: same results, slower by what the disk "
        "takes, and every step writes to it"
    ]


_WHY_THERE = {
    "disk": "the kernel keeps in RAM what is free, and can take it back",
    "memory": "pinned beside the GPU, which copies from there by itself; a run that is killed makes it again",
}


def _cache(plan: Plan, config: TrainConfig) -> list[str]:
    if config.schedule == "parallel":
        turns = "parallel: weights and optimizer state of all modules stay in memory"
        cached = ["what the frozen front puts out"] if plan.passed else []
        cached += ["what the last puts out, once, for the classifier"] if plan.classifier else []
        reasons = [f"{turns}; nothing is cached{' but ' if cached else ''}{' and '.join(cached)}"]
    else:
        reasons = [
            f"cache {'in' if plan.cache_tier == 'memory' else 'on'} {plan.cache_tier}: "
            + ("as asked" if config.cache != "auto" else _WHY_THERE[plan.cache_tier])
        ]
    if config.shuffle == "chunks":
        reasons.append(
            "shuffled by chunks: nothing is trained from a cache"
            if config.schedule == "parallel" and not plan.passed
            else "shuffled by chunks: cached samples are drawn from about 32 MB of neighbours at a time"
        )
    if config.cache_dtype == "auto" and plan.cache_dtype != "fp32":
        limit = format_size(config.cache_limit_bytes or 0)
        reasons.append(f"cache in {plan.cache_dtype}: fp32 would not fit the limit of {limit}")
    return reasons


def _views(config: TrainConfig) -> list[str]:
    if not config.augment:
        return []
    names, count = ", ".join(map(name_of, config.augment)), config.view_count
    if count == 1:
        return [f"one view of each training sample is cached, as it is; {names} where the data are read, an epoch anew"]
    return [
        f"{count} views of each training sample are cached, the first as it is, the others by {names}: "
        f"{count} times the cache of the training samples"
    ]


def refusal(
    chain: Chain,
    config: TrainConfig,
    bounds: Sequence[int],
    ladders: Sequence[Sequence[Rung]],
    budget: int,
    floor: int,
    norms: Sequence[Norm | None],
    *,
    exact: bool,
    cache: str = "",
) -> BudgetInfeasibleError:
    """The error that names the module which is too large, what it needs, and the ways out.

    `norms` are those that keep each module from smaller micro-batches, if any; `exact` as in `reasons_for`; `cache`
    says that what would fit has too little room for its boundaries.
    """
    worst = max(range(len(ladders)), key=lambda k: ladders[k][-1].peak_bytes)
    rung, segments = ladders[worst][-1], chain.segments[bounds[worst] : bounds[worst + 1]]
    needed = -(-rung.peak_bytes // 1_000_000) * 1_000_000
    below = " (the floor alone is above it)" if budget < floor else ""
    norm = norms[worst]
    no_less = ""
    if norm is not None:
        no_less = f"; {norm} cannot train on fewer than {norm.least} samples at a time"
    elif not exact and config.micro_batch == "auto" and rung.micro_batch_size in (2, 3):
        no_less = "; there are no micro-batches of one sample, since BatchNorm has no statistics of one"
    pinned = [
        f"--{name} auto"
        for name, value in (("modules", config.modules), ("micro-batch", config.micro_batch))
        if value != "auto"
    ]
    ways = [*pinned, "--image-size with a smaller side"]
    if config.optimizer == "adamw":
        ways.append("--optimizer sgd")
    if config.head != "pooled-linear":
        ways.append("--head pooled-linear")
    if cache:
        ways = ["a larger --cache-limit", "--cache-dtype int8", *ways]
        below = f" and the cache at once ({cache})"
    return BudgetInfeasibleError(
        f"nothing fits the budget of {format_size(budget)}{below}: module {worst} ({segments[0].name}"
        f"{'..' + segments[-1].name if len(segments) > 1 else ''}) needs {format_size(rung.peak_bytes)} at {rung}, "
        f"of which {format_size(floor)} is the floor (Python, torch and this program){no_less}",
        budget_bytes=budget,
        smallest_feasible_budget_bytes=needed,
        hint=f"the smallest feasible budget is {needed // 1_000_000}MB; or lower the need: {', '.join(ways)}",
    )
