"""Trainer: the facade that apps embed. It prints nothing, installs no signal handler and puts global state back."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.meter import meter_for
from ondevice_trgl.errors import UsageError
from ondevice_trgl.model.partition import Partition
from ondevice_trgl.model.store import ModuleStore
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.report.model import Report
from ondevice_trgl.run import results
from ondevice_trgl.run.callbacks import Callback
from ondevice_trgl.run.guards import device_named, global_state_kept
from ondevice_trgl.run.prepare import chain_of, create_run, make_run_plan, open_run, sources
from ondevice_trgl.run.run_dir import RunDir
from ondevice_trgl.run.session import Session
from ondevice_trgl.run.trained import TrainedRun
from ondevice_trgl.units import parse_size


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
        self._session: Session | None = None

    def request_pause(self) -> None:
        """Checkpoint after the current step and return from `fit`. May be called from any thread."""
        self._pause.set()

    def set_budget(self, budget: str | int) -> None:
        """Change the budget of the run that is training. May be called from any thread.

        A smaller one takes effect by the next step, a larger one by the next module. Raises SizeError, and UsageError
        where nothing is training.
        """
        size = parse_size(budget, what="budget")
        if self._session is None:
            raise UsageError("nothing is training: set_budget changes a running fit", hint="give TrainConfig a budget")
        self._session.budget.request(size)

    def plan(self, train_set: Any, val_set: Any = None, test_set: Any = None) -> Plan:
        """What `fit` would do, without training. Raises BudgetInfeasibleError, PartitionError, DataError.

        Runs every block at a batch of 2 and 4; leaves the model as it was.
        """
        with global_state_kept(self.config.threads), meter_for(self.device) as meter:
            data = sources(train_set, val_set, test_set)
            return make_run_plan(chain_of(self.model, data), data, self.config, meter)

    def fit(
        self,
        train_set: Any,
        val_set: Any = None,
        test_set: Any = None,
        *,
        resume: bool = False,
    ) -> Report:
        """Train, and return the report, which is in the run directory too; status is completed or paused.

        With `resume`, go on where the run directory stands: same model, configuration and data. Modules are chosen and
        compared on `val_set`; without one, the last head counts as best. Raises TrglError; the run can then be resumed.
        """
        self._pause.clear()
        started = time.perf_counter()
        with global_state_kept(self.config.threads), meter_for(self.device) as meter:
            data = sources(train_set, val_set, test_set)
            if resume:
                prepared = open_run(self.run_dir, data, self.config, self.model)
            else:
                RunDir.check(self.run_dir, force=self.force)
                chain = chain_of(self.model, data)
                plan = make_run_plan(chain, data, self.config, meter)
                prepared = create_run(self.run_dir, chain, data, self.config, plan, force=self.force, workload={})
            session = Session(
                prepared, data, self.callbacks, self._pause, meter, self.device, started, meter.peak_bytes(), {}
            )
            self._session = session
            try:
                return session.run()
            finally:
                self._session, self._partition = None, prepared.partition

    def export(self, head: str | int = "best") -> nn.Module:
        """The trained network in eval mode, its weights loaded: the caller's own model.

        `head` is "last", "best" (by validation) or a module's index. An auxiliary head gives a network that stops
        there. Raises UsageError before `fit`.

        Memory: the caller's model is whole, so all weights up to the head, at once and beyond any budget.
        `export.export_run` writes the same weights to a file within a megabyte.
        """
        if self._partition is None:
            raise UsageError("nothing is trained yet", hint="call fit first")
        index = TrainedRun.open(self.run_dir, finished=False).head(head)
        return results.load_network(ModuleStore(self.run_dir / "modules"), self._partition, self.config, index)
