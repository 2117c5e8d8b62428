"""Trainer: stage, plan, train, report. It prints nothing, installs no signal handler and puts global state back.

The run directory is what one step hands to the next:

    stage   a model, or a callable that makes one -> blueprint, weights       setup/staging.py
    plan    blueprint + budget -> plan.json                                   setup/planning.py, a process of its own
    train   run directory -> trained modules, report.json                     run/session.py
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.device.limit import MemoryLimit, lacks_memory, limit_for, refused_bytes
from ondevice_trgl.device.meter import PeakMeter, meter_for
from ondevice_trgl.device.pages import release_code_pages
from ondevice_trgl.device.randomness import Randomness
from ondevice_trgl.device.start import patient_environment
from ondevice_trgl.device.tree import descendants_bytes, process_tree_rss
from ondevice_trgl.errors import BudgetInfeasibleError, ProcessDiedError, UsageError
from ondevice_trgl.isolated import Isolated
from ondevice_trgl.model.store import ModuleStore, bytes_in, fill, is_evicted, state_of
from ondevice_trgl.model.tensorfile import read_tensors
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.plan.memo import Memo, circumstances, memo_folder
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.policy import Stated
from ondevice_trgl.processes import Ask, ask
from ondevice_trgl.report.model import Report, read_report
from ondevice_trgl.run import results
from ondevice_trgl.run.batches import Source
from ondevice_trgl.run.callbacks import Callback
from ondevice_trgl.run.conditions import check_conditions
from ondevice_trgl.run.guards import allowed, alone, device_named, flags_kept, global_state_kept
from ondevice_trgl.run.opening import Opened, open_run, sources
from ondevice_trgl.run.record import RunRecord
from ondevice_trgl.run.run_dir import COSTS, PLAN, RECORD, WEIGHTS, RunDir, read_json
from ondevice_trgl.run.session import Session
from ondevice_trgl.run.trained import TrainedRun
from ondevice_trgl.setup.helper import stated_budget
from ondevice_trgl.setup.planning import STEPS_OF_AN_APP, plan_staged, rehearsed_task
from ondevice_trgl.setup.rehearse import Rehearsals
from ondevice_trgl.setup.requests import PlanRequest, too_large
from ondevice_trgl.setup.staging import measure, stage
from ondevice_trgl.setup.steps import settled, staging_folder

_LEAST_ROOM_BYTES = 220_000_000
"""What a process that plans needs at least beside this one."""
_LEAST_LIMIT_BYTES = 32_000_000
"""Under a limit that leaves less, an app cannot be expected to go on."""


class Trainer:
    """Trains `model` module by module inside `config.budget`.

    `model` is an nn.Module or a callable that makes one: a callable's weights go to disk while it makes them, so that
    the whole network is never in memory. `fit` takes map-style datasets of (input, label), or (input, targets) of
    numbers, see `TrainConfig.task`. While it runs, the parameters are evicted: they hold no memory but for the module
    in training. `export` fills the model again.

    With `isolate`, `fit` is done by a process of its own, which has the budget for itself, and whose death is a
    ProcessDiedError here; the model stays as it is, and in use, until `export` loads what was trained. Model or
    callable, settings and datasets are pickled, and must be of modules that the process can import.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        config: TrainConfig | None = None,
        *,
        run_dir: str | Path = "trgl-run",
        callbacks: Sequence[Callback] = (),
        force: bool = False,
        isolate: bool = False,
        ask: Ask = ask,
    ) -> None:
        if not callable(model):
            raise UsageError(
                f"model is {type(model).__name__}, expected an nn.Module or a callable that makes one",
                hint="Trainer(make_model) or Trainer(make_model())",
            )
        self.model = model
        self.config = config or TrainConfig()
        self.run_dir = Path(run_dir)
        self.callbacks = tuple(callbacks)
        self.force = force
        self.isolate = isolate
        self._isolated: Isolated | None = None
        self._reopen: Callable[[], Opened] | None = None
        self.device = device_named(self.config.device)
        self._ask = ask
        self._pause = threading.Event()
        self._opened: Opened | None = None
        self._session: Session | None = None
        self._fitting = False
        self._asked: Callable[[], int] | None = None

    def request_pause(self) -> None:
        """Checkpoint after the current step and return from `fit`, or do so as soon as one trains. From any thread."""
        self._pause.set()
        if (isolated := self._isolated) is not None:
            isolated.pause()

    def set_budget(self, budget: Stated) -> None:
        """Change the budget of the run that is training, as TrainConfig takes it. May be called from any thread.

        A smaller one takes effect by the next step, a larger one by the next module; while `fit` still plans, by the
        first. Raises SizeError, and UsageError where nothing is training.
        """
        ask = allowed(budget, self.device)
        ask()
        if (isolated := self._isolated) is not None:
            isolated.set_budget(budget)
            return
        if not self._fitting:
            raise UsageError("nothing is training: set_budget changes a running fit", hint="give TrainConfig a budget")
        self._asked = ask
        if (session := self._session) is not None:
            session.budget.request(ask)

    def plan(self, train_set: Any, val_set: Any = None, test_set: Any = None) -> Plan:
        """What `fit` would do, without training; leaves the model as it was.

        Raises BudgetInfeasibleError, PartitionError, DataError.
        """
        with alone(), global_state_kept(self.config.threads), flags_kept(self.model), meter_for(self.device) as meter:
            data = sources(train_set, val_set, test_set, self.config.asked_task)
            with settled(self.config) as budget, staging_folder(self.run_dir) as folder:
                return self._stage_and_plan(data, self._record(*budget), folder, meter, keep=True)[1]

    def fit(
        self,
        train_set: Any,
        val_set: Any = None,
        test_set: Any = None,
        *,
        resume: bool | str = False,
    ) -> Report:
        """Train, and return the report, which is in the run directory too; status is completed or paused.

        With `resume`, go on where the run directory stands: same model, configuration and data; with "auto", where
        there is a run, and else begin one. Modules are chosen and compared on `val_set`; without one, the last head
        counts as best. Raises TrglError; the run can then be resumed.
        """
        if not (isinstance(resume, bool) or resume == "auto"):
            raise UsageError(f"resume = {resume!r}: expected True, False or 'auto'")
        if self._fitting:
            raise UsageError("this trainer is training already", hint="wait until it has ended, or pause it")
        sets = train_set, val_set, test_set
        resume = (self.run_dir / RECORD).is_file() if resume == "auto" else bool(resume)
        self._fitting, self._asked = True, None
        try:
            return self._fit_apart(sets, resume=resume) if self.isolate else self._fit_here(sets, resume=resume)
        finally:
            self._fitting = False
            self._pause.clear()

    def _fit_here(self, sets: tuple[Any, Any, Any], *, resume: bool) -> Report:
        """`fit` by this process."""
        started = time.perf_counter()
        with alone(), global_state_kept(self.config.threads), flags_kept(self.model), meter_for(self.device) as meter:
            data = sources(*sets, self.config.asked_task)
            opened = self._reopened(data) if resume else self._new(data, meter)
            budget = self.config.budget
            self._session = Session(
                opened,
                data,
                self.callbacks,
                self._pause,
                meter,
                self.device,
                started,
                meter.peak_bytes(),
                ask=None if budget is None else allowed(budget, self.device),
            )
            if self._asked is not None:  # while it was planned
                self._session.budget.request(self._asked)
            try:
                return self._session.run()
            finally:
                self._session, self._opened = None, opened

    def _fit_apart(self, sets: tuple[Any, Any, Any], *, resume: bool) -> Report:
        """`fit` by a process of its own."""
        arguments = {"model": self.model, "run_dir": self.run_dir, "force": self.force}
        self._isolated = Isolated(self.config, self.callbacks)
        if self._pause.is_set():
            self._isolated.pause()
        try:
            self._isolated.fit(type(self), arguments, sets, resume=resume)
        finally:
            self._isolated = None
        self._reopen = lambda: self._reopened(sources(*sets, self.config.asked_task))
        return read_report(self.run_dir)

    @staticmethod
    def _record(config: TrainConfig, stated: str, why: str) -> RunRecord:
        """Of a run of this program's own, before its data is known; see `settled`."""
        return RunRecord(config, {}, stated=stated, why_budget=why, allocator="system")

    def _new(self, data: dict[str, Source], meter: PeakMeter) -> Opened:
        RunDir.check(self.run_dir, force=self.force, cache_dir=self.config.cache_dir)
        check_conditions(self.config)
        with settled(self.config) as budget, staging_folder(self.run_dir) as folder, self._given_back(folder):
            record = self._record(*budget)
            chain, _ = self._stage_and_plan(data, record, folder, meter, keep=False)
            RunDir.adopt(folder, self.run_dir, force=self.force)
        return open_run(self.run_dir, data, record.config, chain)

    @contextlib.contextmanager
    def _given_back(self, folder: Path) -> Iterator[None]:
        """The caller's model gets its weights back where nothing comes of what was staged in `folder`."""
        try:
            yield
        except BaseException:
            staged = folder / WEIGHTS
            if isinstance(self.model, nn.Module) and is_evicted(self.model) and staged.is_file():
                wanted = state_of(self.model).keys()
                fill(self.model, read_tensors(staged, lambda name: name in wanted), staged)
            raise

    def _reopened(self, data: dict[str, Source]) -> Opened:
        with settled(self.config) as (config, _, _):
            if isinstance(self.model, nn.Module):
                return open_run(self.run_dir, data, config, self.model)
            made = None if RunDir.open(self.run_dir).has_blueprint else self.model()
            return open_run(self.run_dir, data, config, made)

    def _stage_and_plan(
        self, data: dict[str, Source], record: RunRecord, folder: Path, meter: PeakMeter, *, keep: bool
    ) -> tuple[Chain, Plan]:
        """With `keep` weights stay where they are, in the model, else they are in `folder` and the chain is evicted."""
        chain = stage(self.model, data, record, folder, weights=not keep)
        record = RunRecord.from_dict(read_json(folder / RECORD))
        release_memory()
        release_code_pages()
        has_room = meter.kind != "rss" or stated_budget(record.config) - process_tree_rss() > _LEAST_ROOM_BYTES
        if not record.no_blueprint and has_room:
            floor = meter.current_bytes()
            if meter.kind == "rss":
                held = 0 if is_evicted(chain.model) else bytes_in(state_of(chain.model).values())
                floor = max(0, floor + descendants_bytes() - held)
            request = PlanRequest(folder, process_tree_rss(), floor_bytes=floor)
            # an app may run where no second Python can be started, and two processes have less room than one
            with contextlib.suppress(ProcessDiedError, BudgetInfeasibleError):
                self._ask("plan", request.to_dict(), environment=patient_environment(os.environ))
                return chain, Plan.from_dict(read_json(folder / PLAN))
        return chain, self._planned_here(chain, record, folder, meter)

    def _planned_here(self, chain: Chain, record: RunRecord, folder: Path, meter: PeakMeter) -> Plan:
        """The plan, made in this process: without a blueprint, or without room for another process."""
        drawn = Randomness.now(torch.device("cpu"))  # layers of the caller's may draw from them in rehearsals
        release_memory()
        release_code_pages()
        limit, memo = limit_for(self.device), Memo(memo_folder(), **circumstances(self.device))
        if not (folder / COSTS).is_file():
            self._measured_here(chain, record.config, folder, meter, limit)
        release_memory()
        release_code_pages()
        beside = descendants_bytes() if meter.kind == "rss" else 0
        rehearsals = Rehearsals(
            chain,
            record.config,
            meter,
            limit,
            memo,
            rehearsed_task(record, chain),
            room_bytes=stated_budget(record.config) - beside,
            scratch=folder,
            steps=STEPS_OF_AN_APP,
        )
        try:
            floor = rehearsals.floor_bytes + beside
            if not is_evicted(chain.model) and meter.kind == "rss":
                floor -= bytes_in(state_of(chain.model).values())
            return plan_staged(folder, chain, record, rehearsals, floor_bytes=floor)
        finally:
            rehearsals.close()
            drawn.restore(torch.device("cpu"))

    def _measured_here(
        self, chain: Chain, config: TrainConfig, folder: Path, meter: PeakMeter, limit: MemoryLimit
    ) -> None:
        """What the pieces of `chain` take, measured within the budget. Raises BudgetInfeasibleError."""
        budget = stated_budget(config)
        try:
            # with next to nothing left Python itself would crash, and no plan will fit: the planner says what would
            if meter.kind == "rss" and budget - meter.current_bytes() > _LEAST_LIMIT_BYTES:
                limit.set(budget)
            measure(chain, config, folder)
        except Exception as error:
            if not lacks_memory(error):
                raise
            limit.lift()  # saying what happened takes memory too
            raise too_large(budget, meter.peak_bytes() + refused_bytes(error)) from error
        finally:
            limit.lift()

    def export(self, head: str | int = "best") -> nn.Module:
        """The trained network in eval mode, its weights loaded: the caller's own model, or what its callable makes.

        `head` is "last", "best" (by validation) or a module's index. An auxiliary head gives a network that stops
        there; of a paused run those that are finished. Memory: the weights of the whole network. Raises UsageError
        before `fit`, RunDirError where no head is finished.
        """
        if self._reopen is not None:
            self._opened, self._reopen = self._reopen(), None
        if self._opened is None:
            raise UsageError("nothing is trained yet", hint="call fit first")
        index = TrainedRun.open(self.run_dir).head(head)
        return results.load_network(ModuleStore(self.run_dir / "modules"), self._opened.partition, self.config, index)
