"""Rehearsal: a module of the plan trained for one step on noise and swept once, and what that took.

The same steps, cache and limit as in the run, so that the figure is what the run will measure. Where it does not fit,
a smaller micro-batch of the same module shows what is taken beside the tensors, and the plan is made anew with what was
learned.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.allocator import HOLDS, TIGHT
from ondevice_trgl.device.limit import MemoryLimit, start_libraries
from ondevice_trgl.device.meter import CudaMeter, PeakMeter, RssMeter
from ondevice_trgl.device.precision import autocast_dtype
from ondevice_trgl.errors import BudgetExceededError
from ondevice_trgl.model.alike import likeness
from ondevice_trgl.model.heads import head_behind
from ondevice_trgl.model.partition import group
from ondevice_trgl.model.store import evict, fill_with_noise, is_evicted
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.plan.costs import Costs
from ondevice_trgl.plan.falsify import estimate_scale
from ondevice_trgl.plan.memo import Memo
from ondevice_trgl.plan.plan import Level, Plan, Rung
from ondevice_trgl.plan.predict import MOST_SHARE, Predictor, Rehearsed, from_smaller
from ondevice_trgl.run.boundaries import Boundaries
from ondevice_trgl.run.budget import Budget
from ondevice_trgl.run.guards import device_named
from ondevice_trgl.run.stepper import Pressure, Stepper
from ondevice_trgl.setup.scene import Noise, Scene, sweep_once
from ondevice_trgl.tasks import CLASSES
from ondevice_trgl.trgl.loss import built_in
from ondevice_trgl.trgl.multiplier import Multiplier
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.trgl.step import Objective
from ondevice_trgl.trgl.task import Task

MARGIN = 1.01
"""The run has its callbacks, and a history: what is measured is taken this much larger."""
REFUSED = 1.03
"""What did not fit at any micro-batch is taken to need this much more than there was."""

_SLACK = {"loose": 1.05, "firm": 1.01}
"""How many times as much the allocator takes at least, held less tight."""
_LOOSE_STEPS = 4
"""Rehearsed with the allocator held less tight: each of the first finds the heap full of what the one before left."""

_EXACT = (RssMeter.name, CudaMeter.name)
"""Meters that miss no peak, and can be reset."""

_ABOVE, _STEP, _SWEEP = _FIGURES = ("rehearsal", "rehearsed step", "rehearsed sweep")


class Rehearsals:
    """Runs modules of plans, and remembers what they took. The tensors of `chain` must be evicted.

    `room_bytes` is what this process may take, `scratch` a folder on the disk of the cache. One of `steps` shows all
    where the allocator is held to what is needed; one that is not keeps a little more with each of the first few.
    """

    def __init__(
        self,
        chain: Chain,
        config: TrainConfig,
        meter: PeakMeter,
        limit: MemoryLimit,
        memo: Memo,
        task: Task,
        *,
        room_bytes: int,
        scratch: Path,
        steps: int = 1,
    ) -> None:
        self.scale = estimate_scale()
        self._chain, self._config, self._meter, self._limit, self._task = chain, config, meter, limit, task
        self._memo = memo if self.scale == 1.0 else Memo(None)  # what was measured would correct it
        self._room, self._scratch, self._steps = room_bytes, scratch, steps
        self.possible = self.scale == 1.0 and meter.name in _EXACT and is_evicted(chain.model)
        self.on_gpu = meter.kind == CudaMeter.kind
        self._device = device_named(config.device) if self.on_gpu else torch.device("cpu")
        self._budget = Budget(room_bytes, limit, meter)
        if self.on_gpu:
            start_libraries(self._device)
        self._budget.make_room()
        self.floor_bytes = meter.current_bytes()
        """What this process holds before the first module."""
        self.above: dict[tuple[int, int, Level], Rehearsed] = {}
        """(start, stop, level) -> what was learned of it."""

    def close(self) -> None:
        """Put back the limit that was there before, and end the threads that were started."""
        self._budget.end()

    def of(self, plan: Plan, costs: Costs) -> bool:
        """Measure the modules of `plan` that are not known, the largest first; False as soon as one does not fit."""
        partition = group(self._chain, plan.bounds)
        most = plan.budget_bytes - plan.floor_bytes
        for index in sorted(range(plan.num_parts), key=lambda k: -plan.rungs[k].peak_bytes):
            rung = plan.rungs[index]
            key = (plan.bounds[index], plan.bounds[index + 1], rung.level)
            if key not in self.above:
                scene = Scene(partition, index, plan, costs)
                learned = self._learn(scene, rung, most)
                if learned is None:
                    continue
                self.above[key] = learned
            if self.above[key].above_bytes > most:
                return False
        return True

    def looser(self, plan: Plan, costs: Costs, index: int) -> Iterator[tuple[Rung, Rehearsed]]:
        """The first rung of module `index` with the allocator held less tight, as far as that fits; the fastest first.

        Only where the module was rehearsed on that rung, and has tensors that are blocks of their own held tight.
        """
        rung, most = plan.rungs[index], plan.budget_bytes - plan.floor_bytes
        start, stop = plan.bounds[index : index + 2]
        tight = self.above.get((start, stop, rung.level))
        widest = rung.micro_batch_size * max(costs.input_bytes if not start else 0, *costs.output_bytes[start:stop])
        widest = max(widest, *(segment.largest for segment in costs.segments[start:stop]))
        if tight is None or not tight.is_direct or widest < HOLDS[TIGHT][0] or rung.spilled:
            return
        scene = Scene(group(self._chain, plan.bounds), index, plan, costs)
        accumulate = rung.micro_batch_size < plan.batch_size
        for how in self._limit.holds[:-1]:
            tried = dataclasses.replace(rung, hold=how)
            if int(_SLACK[how] * tight.above_bytes) > most:
                continue
            found = self._known_or_measured(scene, tried, most, accumulate=accumulate)
            if found is not None and found.above_bytes <= most:
                yield tried, found

    def _learn(self, scene: Scene, rung: Rung, most: int) -> Rehearsed | None:
        """Of one rung, measured or from a smaller micro-batch; None where nothing can be measured."""
        accumulate = rung.micro_batch_size < scene.plan.batch_size
        full = scene.tensors(rung, accumulate=accumulate)
        beside = max(0, rung.peak_bytes - scene.plan.floor_bytes - full.total)
        room = min(most, self._room - self.floor_bytes)
        rungs = [dataclasses.replace(rung, micro_batch_size=micro) for micro in _halved(rung.micro_batch_size)]
        fitting = [one for one in rungs if scene.tensors(one, accumulate=accumulate).total + beside <= room]
        for tried in fitting or rungs[:1]:
            known = self._known_or_measured(scene, tried, most, accumulate=accumulate)
            if known is not None and tried is rungs[0]:
                return known
            if known is not None:
                small = scene.tensors(tried, accumulate=accumulate)
                times = rung.micro_batch_size // tried.micro_batch_size
                above = from_smaller(scene.costs, scene.span, known.above_bytes, small, full, times)
                was_refused = fitting[0] is rungs[0]
                above = max(above, most + 1) if was_refused else above
                step, sweep = ((s and s * times) for s in (known.step_seconds, known.sweep_seconds))
                return Rehearsed(above, False, step, sweep)  # time grows in proportion to the batch
            if not self.possible:
                return None
        if room == most:
            return Rehearsed(max(int(REFUSED * most), full.total), is_direct=False)
        # the run will have more than this process, whose caller waits beside it: weights fill it at any micro-batch
        careful = Predictor(scene.costs, scene.plan.batch_size, self.above, MOST_SHARE).allowing(MOST_SHARE)
        # without a margin: what is guessed here counts as learned, and one on top of another would have no end
        enough = careful.above(*scene.span, rung.level)
        return Rehearsed(max(int(enough), room + 1), is_direct=False)

    def _known_or_measured(self, scene: Scene, rung: Rung, most: int, *, accumulate: bool) -> Rehearsed | None:
        """What it takes, with some margin, and how long; None where the limit refused it."""
        key = {
            **{
                name: getattr(self._config, name)
                for name in ("tau", "transport", "head", "optimizer", "momentum", "device")
            },
            "micro_batch": rung.micro_batch_size,
            "checkpointed": rung.checkpointed,
            "spilled": rung.spilled,
            "steps": self._steps_on(rung),
            "accumulated": accumulate,
            "cache": [scene.plan.cache_tier, scene.plan.cache_dtype],
            "last": scene.is_last,
            "classes": self._chain.num_outputs,
            "boundary": [scene.module.channel_axis, scene.module.head_limit],
            **({} if self._config.precision == "fp32" else {"precision": self._config.precision}),
            **({"passed": True} if scene.module.passed else {}),
            **({} if rung.hold == TIGHT else {"hold": rung.hold}),
            **({} if self._task.kind == CLASSES else {"task": self._task.kind}),
        }
        alike = likeness(scene.module)
        known = {name: self._memo.get(name, alike, **key) for name in _FIGURES}
        above = known[_ABOVE]
        if above is None and self.possible:
            measured = self._measure(scene, rung, most, accumulate=accumulate)
            if measured is None:
                return None
            above = MARGIN * measured.above_bytes
            known |= {_STEP: measured.step_seconds, _SWEEP: measured.sweep_seconds}
            for name, figure in {**known, _ABOVE: above}.items():
                if figure is not None:
                    self._memo.put(name, alike, figure, **key)
        return None if above is None else Rehearsed(int(above), True, known[_STEP], known[_SWEEP])

    def _steps_on(self, rung: Rung) -> int:
        return self._steps if rung.hold == TIGHT else max(self._steps, _LOOSE_STEPS)

    def _measure(self, scene: Scene, rung: Rung, most: int, *, accumulate: bool) -> Rehearsed | None:
        """Peak above the floor, and times; None where the limit refused it."""
        budget, meter = self._budget, self._meter
        budget.make_room()
        budget.bytes = min(self._room, self.floor_bytes + most)
        budget.enforce()
        meter.reset()
        module = scene.module
        fill_with_noise(module, device=self._device)
        try:
            seconds = self._train_and_sweep(scene, rung, budget, rung.micro_batch_size * (2 if accumulate else 1))
        except BudgetExceededError:
            return None
        finally:
            peak = meter.peak_bytes()
            evict(module)
            budget.bytes = self._room
            budget.make_room()
        return Rehearsed(peak - self.floor_bytes, True, *seconds)

    def _train_and_sweep(self, scene: Scene, rung: Rung, budget: Budget, samples: int) -> tuple[float, float]:
        """Steps of `samples`, one micro-batch or, where they are accumulated, two: those show all.

        Returns seconds of a micro-batch in the last step and in the sweep; where there is one, warming up included.
        """
        config, module, plan, task, device = self._config, scene.module, scene.plan, self._task, self._device
        head = None if scene.is_last or module.passed else head_behind(module, config.head, task.outputs).to(device)
        loss = built_in(task, config.label_smoothing, torch.ones(task.outputs) if config.class_weights else None)

        def objective(rung: Rung) -> Objective:
            return Objective(
                module,
                head,
                tau=config.tau_value,
                transport=config.transport,
                transport_norm=config.transport_norm,
                label_smoothing=config.label_smoothing,
                autocast=autocast_dtype(config.precision, device),
                loss=loss,
                task=task,
                multiplier=Multiplier.of(config),
                pieces=scene.partition.pieces(scene.index) if rung.checkpointed else (),
            )

        stepper = Stepper(
            objective,
            Optimizer(
                config.optimizer,
                objective(rung).parameters(),
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                clip_norm=config.clip_norm,
            ),
            (rung,),
            rung,
            batch_size=samples,
            in_shape=module.in_shape,
            in_dtype=self._chain.in_dtype if scene.index == 0 else torch.float32,
            device=device,
            budget=budget,
            scratch=self._scratch,
            notify=_unheard,
        )
        noise = Noise(module.in_shape, task.noise(plan.batch_size))
        stepper.objective.train_mode(True)
        trained = 0.0  # of the last module, where that is frozen: there is nothing to train
        try:
            for _ in range(self._steps_on(rung) if stepper.optimizer.parameters else 0):
                started = time.perf_counter()
                stepper.step(noise, range(samples), 1e-6)
                trained = time.perf_counter() - started
        finally:
            stepper.close()
        with tempfile.TemporaryDirectory(prefix="boundary-", dir=self._scratch) as folder:
            kept = plan.cache_tier, plan.cache_dtype, Path(folder)
            boundaries = Boundaries({"train": noise}, *kept, for_gpu=self.on_gpu)
            noise.labels = noise.labels[: rung.micro_batch_size]
            started = time.perf_counter()
            try:
                sweep_once(stepper, boundaries, module, device, budget, write=not scene.is_last)
            finally:
                boundaries.close()
            return trained * rung.micro_batch_size / samples, time.perf_counter() - started


def _halved(micro: int) -> list[int]:
    """`micro`, its half and so on, down to 2: BatchNorm has no statistics of one sample."""
    sizes = [micro]
    while sizes[-1] % 2 == 0 and sizes[-1] > 2:
        sizes.append(sizes[-1] // 2)
    return sizes


def _unheard(pressure: Pressure, rung: Rung) -> None:
    """A rehearsal has nobody to tell."""
