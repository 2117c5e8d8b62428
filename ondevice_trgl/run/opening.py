"""A run directory, opened: plan, modules and heads, none of which holds memory until the scheduler loads it."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ondevice_trgl.condition_settings import ConditionSettings
from ondevice_trgl.config import TrainConfig
from ondevice_trgl.data.augment import Augmented
from ondevice_trgl.data.classes import check_alike
from ondevice_trgl.data.images import ImageSet, all_alike
from ondevice_trgl.data.preprocessing import Preprocessing
from ondevice_trgl.data.splits import check_zero_used
from ondevice_trgl.data.user import image_set
from ondevice_trgl.device.host import usable_ram_bytes
from ondevice_trgl.device.precision import autocast_dtype
from ondevice_trgl.errors import DamagedFileError, DataError, RunDirError, UsageError
from ondevice_trgl.model.blueprint import from_blueprint
from ondevice_trgl.model.filed import weights_in_file
from ondevice_trgl.model.heads import head_behind
from ondevice_trgl.model.partition import Partition, group
from ondevice_trgl.model.store import ModuleStore, bytes_in, evict, is_evicted, state_of
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.model.tuning import tuned
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.run.batches import Source, check_labels, mix
from ondevice_trgl.run.guards import device_named, outline
from ondevice_trgl.run.inputs import check_ids, traced
from ondevice_trgl.run.links import check_folder
from ondevice_trgl.run.lock import held
from ondevice_trgl.run.record import RunRecord
from ondevice_trgl.run.recovery import mend
from ondevice_trgl.run.run_dir import BLUEPRINT, NAMES, PARTITION, PLAN, RECORD, RunDir
from ondevice_trgl.tasks import AUTO, CLASSES, CROSS_ENTROPY
from ondevice_trgl.trgl.loss import task_loss
from ondevice_trgl.trgl.task import Task
from ondevice_trgl.typed import value_of
from ondevice_trgl.units import format_size

_Names = Mapping[str, tuple[str, ...]]
_WIDE, _LARGE = 4096, 1 << 24
"""Channels and numbers of a module's output from which on its head may be large: shapes are what a blueprint states."""


@dataclass(frozen=True)
class Opened:
    """A run directory with what it holds; the modules and heads are on disk, and hold no memory."""

    run: RunDir
    task: Task
    record: RunRecord
    plan: Plan
    partition: Partition
    heads: tuple[nn.Module | None, ...]
    store: ModuleStore
    aliases: dict[str, tuple[str, ...]]
    """Names in the model's state dict, as `aliases_of` gives them."""
    mended: tuple[str, ...] = ()
    """What of it was damaged, and what was taken in its place."""

    @property
    def config(self) -> TrainConfig:
        return self.record.config


def sources(train_set: Any, val_set: Any, test_set: Any, task: str = AUTO) -> dict[str, Source]:
    """The splits that there are, ready to be read in batches, labels as `task` says. Raises DataError."""
    given = {"train": train_set, "val": val_set, "test": test_set}
    read: dict[str, ImageSet] = {}
    for name, split in given.items():
        if split is not None:
            width = next((one.labels.shape[1] for one in read.values() if one.labels.is_floating_point()), None)
            read[name] = image_set(split, name=f"{name} set", task=task, width=width)
            task = read[name].task  # what the first tells holds for all
    check_alike({f"{name} set": split.class_names for name, split in read.items()})
    return dict(read)


def kind_of(source: Source) -> str:
    """What the labels of a dataset are: classes, regression, multi-label."""
    return source.task if isinstance(source, ImageSet) else CLASSES


def chain_of(model: nn.Module, data: dict[str, Source], config: TrainConfig | None = None) -> Chain:
    """The traced model, once it is known to fit the data; what `config` freezes of it is still to be, see `tuned`.

    Raises PartitionError, UsageError, DataError, ConfigError, NonFiniteError.
    """
    if is_evicted(model):
        raise UsageError(
            "the model's weights are in the run directory, where an earlier fit left them",
            hint="call export first, or fit with resume=True",
        )
    train = data["train"]
    if not len(train.labels):
        raise DataError("the train set is empty", hint="give it samples of at least two classes")
    chain = traced(model, train, freeze_norms=config is not None and config.freeze_norms)
    for name, split in data.items():
        if tuple(split.shape) != chain.in_shape:
            raise DataError(f"the {name} set has samples of shape {split.shape}, the train set {chain.in_shape}")
        check_labels(split.labels, chain.num_outputs, name, getattr(split, "class_names", None) or ())
    kind = kind_of(train)
    if (
        kind == CLASSES
        and getattr(train, "class_names", None) is None
        and int(train.labels.max()) + 1 == chain.num_outputs
    ):
        check_zero_used(train.labels, what="train set")
    if config is not None:
        autocast_dtype(config.precision, device_named(config.device))  # whether it is possible
        task = Task.of(config, kind, chain.num_outputs)
        if (views := Augmented.of(train, config)) is not None:
            views.try_out(chain.in_dtype)
        task_loss(config, train.labels, task)  # whether there is one, and it fits
        if task.own_metric is not None:
            task.own_metric.try_out(train.labels, chain.num_outputs)
    if (constant := getattr(train, "constant", None)) is not None:
        raise all_alike("the train set", len(train.labels), constant, kind="number")
    check_ids(chain, data)
    return chain


def network_of(run: RunDir, make: Callable[[], nn.Module], source: Source, folder: Path, config: TrainConfig) -> Chain:
    """The run's network, evicted: from its blueprint or, where it has none, from `make`, its weights in a file.

    `source` is any split of its data. Raises DamagedFileError, and what `make` raises.
    """
    if run.has_blueprint:
        return from_blueprint(run.read(BLUEPRINT))
    with weights_in_file(folder) as filed:
        model = make()
        filed.take(model)
        with filed.dropped_as_read():
            chain = tuned(traced(model, source, freeze_norms=config.freeze_norms), config)
    evict(model)
    return chain


def fresh_head(chain: Chain, partition: Partition, config: TrainConfig, index: int) -> nn.Module | None:
    """A new auxiliary head; None in the frozen front, and for the last module, which ends in the own classifier.

    Raises DamagedFileError for one that no machine like this has the memory for.
    """
    if index == len(partition.modules) - 1 or partition.modules[index].passed:
        return None
    module = partition.modules[index]
    if max(module.out_shape, default=0) > _WIDE or math.prod(module.out_shape) > _LARGE:
        with torch.device("meta"):  # some megabytes of code, which small heads are spared
            size = bytes_in(state_of(head_behind(module, config.head, chain.num_outputs)).values())
        if size > usable_ram_bytes():
            raise DamagedFileError(f"the head of module {index} would take {format_size(size)}: its shapes are damaged")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix(config.seed, index, 2))
        return head_behind(module, config.head, chain.num_outputs)


def open_run(
    path: Path, data: dict[str, Source], config: TrainConfig | None = None, model: nn.Module | Chain | None = None
) -> Opened:
    """An existing run, for `model` or its chain, or by its blueprint where that is None.

    `config` is what the caller asks for now; without one, what the run was made with. The budget may be another.
    Raises RunDirError where model, data or settings are others, there is no blueprint, or a living process trains it;
    DamagedFileError.
    """
    run = RunDir.open(path)
    with held(path):
        pass  # before anything there is changed; the session then keeps it
    record, plan = run.load(RECORD, RunRecord.from_dict), run.load(PLAN, Plan.from_dict)
    parts, aliases = run.read(PARTITION), run.load(NAMES, lambda names: dict(value_of(_Names, names)))
    check_folder(run.cache_folder(record.config.cache_dir))
    store = ModuleStore(run.modules, run.staged)
    store.recover()
    mended = mend(run, store, plan, record.config)
    config = config or record.config
    chain = _chain(run, store, data, model, record.config)
    before, now = record.config.to_dict(), config.to_dict()
    # these may be others each time
    free = ("budget", "enforce", "checkpoint_every", *(field.name for field in dataclasses.fields(ConditionSettings)))
    # a run from when there was but one loss says its name, where now it is that of the task
    before["loss"] = now["loss"] if {before["loss"], now["loss"]} == {AUTO, CROSS_ENTROPY} else before["loss"]
    changed = [name for name in now if name not in free and before.get(name) != now[name]]
    if config.budget_bytes is not None:
        plan = dataclasses.replace(plan, budget_bytes=config.budget_bytes)
    partition = group(chain, plan.bounds) if plan.bounds[-1] == len(chain.segments) else None
    if partition is None or partition.to_dict() != parts:
        changed.append("the model")
    if record.data != outline(data):
        changed.append("the data")
    if changed or partition is None:
        raise RunDirError(
            f"{path} was made with other settings: {', '.join(changed)}",
            hint="resume with the same, or start a new run",
        )

    def fresh(index: int) -> nn.Module | None:
        return fresh_head(chain, partition, config, index)

    heads = tuple(fresh(index) for index in range(plan.num_parts))
    evict(*partition.modules, *heads)
    needed = {name for part in partition.modules for name, t in state_of(part).items() if isinstance(t, nn.Parameter)}
    if not needed <= {name for names in aliases.values() for name in names}:
        raise DamagedFileError(f"{path / NAMES} lacks names of the network", hint="start a new run")
    task = Task.of(config, Preprocessing.kind_in(record.preprocessing), chain.num_outputs)
    return Opened(
        run,
        task,
        dataclasses.replace(record, config=config),
        plan,
        partition,
        heads,
        ModuleStore(run.modules, run.staged, fresh),
        aliases,
        mended,
    )


def _chain(
    run: RunDir, store: ModuleStore, data: dict[str, Source], model: nn.Module | Chain | None, config: TrainConfig
) -> Chain:
    if isinstance(model, Chain):
        return model
    if model is not None:
        if is_evicted(model):  # an earlier fit left the weights in the run directory
            store.load_model(model)
        return tuned(chain_of(model, data, config), config)
    if not run.has_blueprint:
        raise RunDirError(f"{run.path} has no blueprint", hint="resume it with the model")
    return from_blueprint(run.read(BLUEPRINT))
