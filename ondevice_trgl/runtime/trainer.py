"""Trainer: the facade that apps embed. It prints nothing, installs no signal handler and puts global state back."""

import contextlib
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.data.user import image_set
from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.device.environment import describe_environment
from ondevice_trgl.device.meter import PeakMeter, meter_for
from ondevice_trgl.errors import ConfigError, DataError, RunDirError, TrglError, UsageError
from ondevice_trgl.model.heads import build_head
from ondevice_trgl.model.partition import Partition, group
from ondevice_trgl.model.store import ModuleStore, aliases_of, evict, state_of
from ondevice_trgl.model.trace import Chain, trace
from ondevice_trgl.plan.estimate import estimate
from ondevice_trgl.plan.planner import Plan, make_plan
from ondevice_trgl.report.model import Report, read_report
from ondevice_trgl.runtime import results
from ondevice_trgl.runtime.batches import Source, check_finite, check_labels, mix
from ondevice_trgl.runtime.boundaries import Boundaries
from ondevice_trgl.runtime.callbacks import Callback
from ondevice_trgl.runtime.guards import device_named, global_state_kept, is_evicted, last_report, outline, size
from ondevice_trgl.runtime.progress import Progress
from ondevice_trgl.runtime.run_dir import FORMAT, RunDir
from ondevice_trgl.runtime.scheduler import Measured, Paused, Scheduler


class Trainer:
    """Trains `model` module by module inside `config.budget`.

    `fit` takes map-style datasets of (input, label). While it runs, the model's parameters are evicted: they hold no
    memory but for the module in training. `export` fills the same model again.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig | None = None,
        *,
        run_dir: str | Path = "trgl-run",
        callbacks: Sequence[Callback] = (),
        force: bool = False,
    ) -> None:
        self.model = model
        self.config = config or TrainConfig()
        self.run_dir = Path(run_dir)
        self.callbacks = tuple(callbacks)
        self.force = force
        self.device = device_named(self.config.device)
        self._pause = threading.Event()
        self._partition: Partition | None = None

    def request_pause(self) -> None:
        """Checkpoint after the current step and return from `fit`. May be called from any thread."""
        self._pause.set()

    def plan(self, train_set: Any, val_set: Any = None, test_set: Any = None) -> Plan:
        """What `fit` would do, without training. Raises BudgetInfeasibleError, PartitionError, DataError.

        Runs every block at a batch of 2 and 4; leaves the model as it was.
        """
        with global_state_kept(self.config.threads), meter_for(self.device) as meter:
            data = self._data(train_set, val_set, test_set)
            return self._plan(self._trace(data), data, meter)

    def plan_report(
        self, train_set: Any, val_set: Any = None, test_set: Any = None, *, workload: dict[str, Any] | None = None
    ) -> Report:
        """`plan` as a report with status "planned" and nothing measured."""
        with global_state_kept(self.config.threads), meter_for(self.device) as meter:
            data = self._data(train_set, val_set, test_set)
            chain = self._trace(data)
            plan = self._plan(chain, data, meter)
            partition = group(chain, plan.bounds)
            sizes = [size(m, self._head(chain, partition, k)) for k, m in enumerate(partition.modules)]
            return results.make_report(
                run_dir=None,
                config=self.config,
                plan=plan,
                names=[module.label for module in partition.modules],
                measured=[Measured(params=count) for count in sizes],
                meter=meter,
                status="planned",
                environment=describe_environment(threads=torch.get_num_threads(), device=str(self.device)),
                workload=workload or {},
            )

    def fit(
        self,
        train_set: Any,
        val_set: Any = None,
        test_set: Any = None,
        *,
        resume: bool = False,
        workload: dict[str, Any] | None = None,
    ) -> Report:
        """Train, and return the report, which is in the run directory too; status is completed or paused.

        With `resume`, go on where the run directory stands: same model, configuration and data. Modules are chosen and
        compared on `val_set`; without one, a tenth of `train_set` is not held out and the last head counts as best.
        `workload` is what the report says of model and data. Raises TrglError; the run can then be resumed.
        """
        self._pause.clear()
        started = time.perf_counter()
        with global_state_kept(self.config.threads), meter_for(self.device) as meter:
            data = self._data(train_set, val_set, test_set)
            if resume and is_evicted(self.model):  # an earlier fit left the weights in the run directory
                ModuleStore(RunDir.open(self.run_dir).modules).load_model(self.model)
            chain = self._trace(data)
            aliases = aliases_of(self.model)
            run, plan = self._open(chain, data) if resume else self._create(chain, data, meter)
            before = last_report(run) if resume else None
            partition, heads, store = self._modules(chain, plan, run, fresh=not resume)
            if not resume:  # last, so that only a run that can be resumed has it
                config = self.config.to_dict()
                run.write(
                    "config.json",
                    {"format": FORMAT, "config": config, "workload": workload or {}, "data": outline(data)},
                )
            progress = self._progress(plan, len(data["train"].labels), run)
            folder = run.cache_folder(self.config.cache_dir)
            boundaries = Boundaries(data, plan.cache_tier, plan.cache_dtype, folder)
            scheduler = Scheduler(
                partition, heads, plan, self.config, store, run, boundaries, progress, meter, self.device
            )

            def finish(status: str, message: str = "") -> Report:
                measured = [Measured(**store.position(k)["measured"]) for k in range(plan.num_modules)]
                labels = data["val"].labels if "val" in data else None
                report = results.make_report(
                    run_dir=run.path,
                    config=self.config,
                    plan=plan,
                    names=[module.label for module in partition.modules],
                    measured=measured,
                    accuracy=results.accuracies(store, measured, labels) if status == "completed" else None,
                    meter=meter,
                    peak_outside=max(
                        scheduler.peak_outside, meter.peak_bytes(), (before.measured_peak_bytes or 0) if before else 0
                    ),
                    status=status,
                    message=message,
                    total_seconds=time.perf_counter() - started + (before.seconds.total if before else 0.0),
                    environment=describe_environment(threads=torch.get_num_threads(), device=str(self.device)),
                    workload=workload or {},
                )
                run.write("report.json", report.to_dict())
                return report

            try:
                scheduler.restore_callbacks()
                progress.call("on_fit_start")
                scheduler.fit()
                store.assemble(run.model, aliases)
                progress.call("on_fit_end")
                report = finish("completed")
            except Paused:
                report = finish("paused", "a pause was requested")
            except BaseException as error:
                with contextlib.suppress(TrglError):
                    run.event("failed", error=str(error))
                    finish("failed", str(error))
                progress.call("on_exception", error)
                raise
            finally:
                boundaries.close()
                run.clear_cache(self.config.cache_dir)
                evict(*partition.modules, *heads)
                release_memory()
            self._partition = partition
        return report

    def export(self, head: str | int = "best") -> nn.Module:
        """The trained network in eval mode, its weights loaded: the caller's own model.

        `head` is "last", "best" (by validation) or a module's index. An auxiliary head gives a network that stops
        there. Memory: the weights of the whole network. Raises UsageError before `fit`.
        """
        if self._partition is None:
            raise UsageError("nothing is trained yet", hint="call fit first")
        report = read_report(self.run_dir)
        index = results.head_index(head, len(self._partition.modules), report.accuracy.best_head)
        return results.load_network(ModuleStore(self.run_dir / "modules"), self._partition, self.config, index)

    def _data(self, train_set: Any, val_set: Any, test_set: Any) -> dict[str, Source]:
        given = {"train": train_set, "val": val_set, "test": test_set}
        return {name: image_set(split, name=f"{name} set") for name, split in given.items() if split is not None}

    def _trace(self, data: dict[str, Source]) -> Chain:
        if is_evicted(self.model):
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
        chain = trace(self.model, example)
        for name, split in data.items():
            if tuple(split.shape) != chain.in_shape:
                raise DataError(f"the {name} set has samples of shape {split.shape}, the train set {chain.in_shape}")
            check_labels(split.labels, chain.num_outputs, name)
        return chain

    def _plan(self, chain: Chain, data: dict[str, Source], meter: PeakMeter) -> Plan:
        budget = self.config.budget_bytes
        if budget is None:
            raise ConfigError(["budget: none was stated"], hint='TrainConfig(budget="600MB")')
        costs = estimate(chain, self.config)
        release_memory()
        weights = sum(t.numel() * t.element_size() for t in state_of(self.model).values())
        floor = meter.current_bytes() - weights if meter.kind == "rss" else 0
        return make_plan(
            chain,
            costs,
            self.config,
            budget_bytes=budget,
            floor_bytes=floor,
            rows=sum(len(split.labels) for split in data.values()),
            train_rows=len(data["train"].labels),
        )

    def _create(self, chain: Chain, data: dict[str, Source], meter: PeakMeter) -> tuple[RunDir, Plan]:
        RunDir.check(self.run_dir, force=self.force)
        plan = self._plan(chain, data, meter)
        run = RunDir.create(self.run_dir, force=self.force)
        run.write("plan.json", plan.to_dict())
        return run, plan

    def _open(self, chain: Chain, data: dict[str, Source]) -> tuple[RunDir, Plan]:
        run = RunDir.open(self.run_dir)
        plan, record = Plan.from_dict(run.read("plan.json")), run.read("config.json")
        before, now = record["config"], self.config.to_dict()
        changed = [name for name in now if before.get(name) != now[name]]
        same_cuts = plan.bounds[-1] == len(chain.segments)
        if not same_cuts or group(chain, plan.bounds).to_dict() != run.read("partition.json"):
            changed.append("the model")
        if record["data"] != outline(data):
            changed.append("the data")
        if changed:
            raise RunDirError(
                f"{self.run_dir} was made with other settings: {', '.join(changed)}",
                hint="resume with the same, or start a new run",
            )
        return run, plan

    def _modules(
        self, chain: Chain, plan: Plan, run: RunDir, *, fresh: bool
    ) -> tuple[Partition, list[nn.Module | None], ModuleStore]:
        """The modules and their heads, all of them on disk and evicted."""
        partition = group(chain, plan.bounds)
        store = ModuleStore(run.modules)
        heads: list[nn.Module | None] = []
        for index, module in enumerate(partition.modules):
            head = self._head(chain, partition, index)
            if fresh:
                start = {"laps_done": 0, "epoch": 0, "step": 0, "measured": vars(Measured(params=size(module, head)))}
                store.save(index, module, head, start)
            heads.append(head)
        if fresh:
            store.keep_rest(self.model, partition.modules)
            run.write("partition.json", partition.to_dict())
        evict(*partition.modules, *heads)
        release_memory()
        return partition, heads, store

    def _head(self, chain: Chain, partition: Partition, index: int) -> nn.Module | None:
        """A fresh auxiliary head; None for the last module, which ends in the model's own classifier."""
        if index == len(partition.modules) - 1:
            return None
        torch.manual_seed(mix(self.config.seed, index, 2))
        return build_head(self.config.head, partition.modules[index].out_shape, chain.num_outputs)

    def _progress(self, plan: Plan, rows: int, run: RunDir) -> Progress:
        return Progress(
            run_dir=run.path,
            budget_bytes=plan.budget_bytes,
            laps=self.config.laps,
            num_modules=plan.num_modules,
            epochs=self.config.epochs,
            steps=rows // plan.batch_size,
            callbacks=self.callbacks,
            pause=self._pause,
        )
