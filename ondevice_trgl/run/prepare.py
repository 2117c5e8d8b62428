"""From a model and its data to a run directory that holds everything: plan, weights of every module, blueprint.

Whoever opens the run directory afterwards needs neither the model's code nor the memory of its weights.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.data.user import image_set
from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.device.meter import PeakMeter
from ondevice_trgl.device.pages import release_code_pages
from ondevice_trgl.errors import ConfigError, DataError, RunDirError, UsageError
from ondevice_trgl.model.blueprint import NoBlueprint, from_blueprint, to_blueprint
from ondevice_trgl.model.heads import build_head
from ondevice_trgl.model.partition import Partition, group
from ondevice_trgl.model.store import ModuleStore, aliases_of, bytes_in, evict, is_evicted, parameter_count, state_of
from ondevice_trgl.model.trace import Chain, trace
from ondevice_trgl.plan.costs import Costs
from ondevice_trgl.plan.estimate import estimate
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.plan.planner import LEAST_SCRATCH, SCRATCH, make_plan
from ondevice_trgl.run.batches import Source, check_finite, check_labels, mix
from ondevice_trgl.run.guards import outline
from ondevice_trgl.run.measured import Measured
from ondevice_trgl.run.rehearse import Rehearsals
from ondevice_trgl.run.run_dir import FORMAT, RunDir

BLUEPRINT = "blueprint.json"
_MOST_PLANS = 12
"""Plans that are rehearsed before one is taken as it is; each teaches something."""


@dataclass(frozen=True)
class Prepared:
    """A run directory, opened: the modules and heads are on disk, and hold no memory."""

    run: RunDir
    plan: Plan
    config: TrainConfig
    partition: Partition
    heads: tuple[nn.Module | None, ...]
    store: ModuleStore
    aliases: dict[str, tuple[str, ...]]
    """Names in the model's state dict, as `aliases_of` gives them."""


def sources(train_set: Any, val_set: Any, test_set: Any) -> dict[str, Source]:
    """The splits that there are, ready to be read in batches. Raises DataError."""
    given = {"train": train_set, "val": val_set, "test": test_set}
    return {name: image_set(split, name=f"{name} set") for name, split in given.items() if split is not None}


def chain_of(model: nn.Module, data: dict[str, Source]) -> Chain:
    """The traced model, once it is known to fit the data. Raises PartitionError, DataError, NonFiniteError."""
    if is_evicted(model):
        raise UsageError(
            "the model's weights are in the run directory, where an earlier fit left them",
            hint="call export first, or fit with resume=True",
        )
    train = data["train"]
    if not len(train.labels):
        raise DataError("the train set is empty", hint="give it samples of at least two classes")
    example = torch.zeros((2, *train.shape))
    first = [0, min(1, len(train.labels) - 1)]
    train.read(first, example)
    check_finite(example, first, "the training data")
    chain = trace(model, example)
    for name, split in data.items():
        if tuple(split.shape) != chain.in_shape:
            raise DataError(f"the {name} set has samples of shape {split.shape}, the train set {chain.in_shape}")
        check_labels(split.labels, chain.num_outputs, name)
    return chain


def make_run_plan(chain: Chain, data: dict[str, Source], config: TrainConfig, meter: PeakMeter) -> Plan:
    """The plan for the process in which this is called, by estimate alone.

    Raises BudgetInfeasibleError, PartitionError, ConfigError.
    """
    costs = estimate(chain, config)
    release_memory()
    release_code_pages()
    floor = meter.current_bytes() - bytes_in(state_of(chain.model).values()) if meter.kind == "rss" else 0
    return plan_for(chain, costs, data, config, floor)


def rehearsed_plan(
    chain: Chain,
    costs: Costs,
    data: dict[str, Source],
    config: TrainConfig,
    rehearsals: Rehearsals,
    *,
    beside_bytes: int,
    set_up: Callable[[], int],
) -> Plan:
    """The plan for another process, its modules rehearsed in this one: that holds `beside_bytes` more than this.

    `set_up()` is what setting the run up took at most so far.
    Raises BudgetInfeasibleError, PartitionError, ConfigError.
    """
    for _ in range(_MOST_PLANS):
        floor = rehearsals.floor_bytes + beside_bytes
        plan = plan_for(chain, costs, data, config, floor, rehearsals, set_up())
        if rehearsals.of(plan):
            break
    floor = rehearsals.floor_bytes + beside_bytes
    return plan_for(chain, costs, data, config, floor, rehearsals, set_up())


def plan_for(
    chain: Chain,
    costs: Costs,
    data: dict[str, Source],
    config: TrainConfig,
    floor_bytes: int,
    rehearsals: Rehearsals | None = None,
    set_up_bytes: int = 0,
) -> Plan:
    """`make_plan` for these datasets."""
    if config.budget_bytes is None:
        raise ConfigError(["budget: none was stated"], hint='TrainConfig(budget="600MB")')
    return make_plan(
        chain,
        costs,
        config,
        budget_bytes=config.budget_bytes,
        floor_bytes=floor_bytes,
        rows=sum(len(split.labels) for split in data.values()),
        train_rows=len(data["train"].labels),
        val_rows=len(data["val"].labels) if "val" in data else 0,
        measured=rehearsals.above if rehearsals else None,
        scratch=LEAST_SCRATCH if rehearsals and rehearsals.possible else SCRATCH,
        set_up_bytes=set_up_bytes,
    )


def fresh_head(chain: Chain, partition: Partition, config: TrainConfig, index: int) -> nn.Module | None:
    """A new auxiliary head; None for the last module, which ends in the model's own classifier."""
    if index == len(partition.modules) - 1:
        return None
    torch.manual_seed(mix(config.seed, index, 2))
    return build_head(config.head, partition.modules[index].out_shape, chain.num_outputs)


def create_run(
    path: Path,
    chain: Chain,
    data: dict[str, Source],
    config: TrainConfig,
    plan: Plan,
    *,
    force: bool,
    workload: dict[str, Any],
    weights: tuple[Path, dict[str, tuple[str, ...]]] | None = None,
) -> Prepared:
    """Write the run directory. The model is evicted: its weights are in the run directory from now on.

    `weights`, a file and the names in the model's state dict, is for a chain whose own tensors hold nothing.
    Raises RunDirError, StorageError.
    """
    run = RunDir.create(path, force=force)
    run.write("plan.json", plan.to_dict())
    try:
        run.write(BLUEPRINT, to_blueprint(chain))
    except NoBlueprint as error:
        run.event("no_blueprint", reason=error.message)
    partition = group(chain, plan.bounds)
    run.write("partition.json", partition.to_dict())
    store = ModuleStore(run.modules)
    aliases = aliases_of(chain.model) if weights is None else weights[1]
    heads = []
    for index, module in enumerate(partition.modules):
        head = fresh_head(chain, partition, config, index)
        start = {
            "laps_done": 0,
            "epoch": 0,
            "step": 0,
            "measured": vars(Measured(params=parameter_count(module, head))),
        }
        if weights is None:
            store.save(index, module, head, start)
        else:
            store.move_in(weights[0], index, module, head, start)
        heads.append(head)
    if weights is None:
        store.keep_rest(chain.model, partition.modules)
    else:
        store.move_rest(weights[0], partition.modules)
    run.write("names.json", {name: list(names) for name, names in aliases.items()})
    # last, so that only a run that can be resumed has it
    run.write(
        "config.json",
        {"format": FORMAT, "config": config.to_dict(), "workload": workload, "data": outline(data)},
    )
    evict(*partition.modules, *heads)
    return Prepared(run, plan, config, partition, tuple(heads), store, aliases)


def open_run(path: Path, data: dict[str, Source], config: TrainConfig, model: nn.Module | None) -> Prepared:
    """An existing run, for `model`, or by its blueprint where that is None.

    Raises RunDirError where model, data or settings are others, or there is no blueprint; DamagedFileError.
    """
    run = RunDir.open(path)
    plan, record = Plan.from_dict(run.read("plan.json")), run.read("config.json")
    store = ModuleStore(run.modules)
    if model is None:
        if not (path / BLUEPRINT).is_file():
            raise RunDirError(f"{path} has no blueprint", hint="resume it with the model")
        chain = from_blueprint(run.read(BLUEPRINT))
    else:
        if is_evicted(model):  # an earlier fit left the weights in the run directory
            store.load_model(model)
        chain = chain_of(model, data)
    before, now = record["config"], config.to_dict()
    free = ("budget", "enforce")  # these may be others each time
    changed = [name for name in now if name not in free and before.get(name) != now[name]]
    if config.budget_bytes is not None:
        plan = dataclasses.replace(plan, budget_bytes=config.budget_bytes)
    partition = group(chain, plan.bounds) if plan.bounds[-1] == len(chain.segments) else None
    if partition is None or partition.to_dict() != run.read("partition.json"):
        changed.append("the model")
    if record["data"] != outline(data):
        changed.append("the data")
    if changed or partition is None:
        raise RunDirError(
            f"{path} was made with other settings: {', '.join(changed)}",
            hint="resume with the same, or start a new run",
        )
    heads = tuple(fresh_head(chain, partition, config, index) for index in range(plan.num_modules))
    evict(*partition.modules, *heads)
    aliases = {name: tuple(names) for name, names in run.read("names.json").items()}
    return Prepared(run, plan, config, partition, heads, store, aliases)
