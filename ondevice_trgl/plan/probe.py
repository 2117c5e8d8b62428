"""What the estimate cannot see: memory that kernels take for themselves while they run.

A strided convolution's backward pass, say, may take as much again in scratch as its tensors. One real training step of
each segment, at the batch that is to be used and at a small one, is measured with the kernel's own meter; what it takes
beyond the estimate is the segment's scratch, affine in the batch.
"""

import dataclasses

import torch

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.device.meter import PeakMeter
from ondevice_trgl.model.heads import build_head
from ondevice_trgl.model.partition import LocalModule
from ondevice_trgl.model.store import evict, state_of
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.plan.estimate import Affine, Costs
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.trgl.step import Objective, train_step

SMALL = 4
STEP_BYTES = 2 << 20
"""What is measured is rounded up to this: it comes out some 0.3 MB different each time, and a plan should not."""


def probe(chain: Chain, costs: Costs, config: TrainConfig, batch: int, meter: PeakMeter, *, most_bytes: int) -> Costs:
    """`costs` with the scratch of each segment, measured. The tensors of `chain` must hold nothing; they are evicted.

    Segments whose estimate is above `most_bytes` are not run; they are taken to need what the others do at most.
    Where none is run, `costs` come back as they are, for the planner to allow for what is not known.
    Memory: one segment in training at `batch`. Time: about one end-to-end step at `batch`.
    """
    found: list[Affine | None] = []
    for index in range(len(chain.segments)):
        if costs.module_bytes(index, index + 1, batch, accumulate=False) > most_bytes:
            found.append(None)
            continue
        module = LocalModule.of(chain, index, index + 1)
        release_memory()
        trainee = _Trainee(chain, module, config, index)
        trainee.step(min(SMALL, batch))  # makes the optimizer state, which belongs to the estimate
        small, large = (trainee.scratch(costs, size, meter) for size in (min(SMALL, batch), batch))
        slope = max(0.0, (large - small) / (batch - SMALL)) if batch > SMALL else 0.0
        found.append(Affine(max(0.0, large - slope * batch), slope))
        evict(module)
    known = [scratch for scratch in found if scratch is not None]
    if not known:
        return costs
    most = Affine(
        max((scratch.constant for scratch in known), default=0.0),
        max((scratch.slope for scratch in known), default=0.0),
    )
    return dataclasses.replace(costs, scratch=tuple(most if scratch is None else scratch for scratch in found))


class _Trainee:
    """One segment with its head and optimizer, trained on noise."""

    def __init__(self, chain: Chain, module: LocalModule, config: TrainConfig, index: int) -> None:
        last = index == len(chain.segments) - 1
        head = None if last else build_head(config.head, module.out_shape, chain.num_outputs)
        for tensor in state_of(module).values():
            if tensor.is_floating_point():  # whatever was in that memory may be NaN, or slow
                tensor.data.normal_(0.0, 0.05)
        self.index, self.shape = index, module.in_shape
        self.dtype = torch.float32 if index else chain.in_dtype
        self.objective = Objective(
            module,
            head,
            tau=config.tau_value,
            transport=config.transport,
            transport_norm=config.transport_norm,
            label_smoothing=config.label_smoothing,
        )
        self.objective.train_mode(True)
        self.optimizer = Optimizer(
            config.optimizer,
            self.objective.parameters(),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        tensors = [*state_of(module).values(), *(state_of(head).values() if head is not None else ())]
        self._resident = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def step(self, batch: int) -> None:
        shape = (batch, *self.shape)
        z = torch.randn(shape) if self.dtype.is_floating_point else torch.zeros(shape, dtype=self.dtype)
        labels = torch.zeros(batch, dtype=torch.int64)
        train_step(self.objective, self.optimizer, iter([(z, labels)]), 1, 1e-6)

    def scratch(self, costs: Costs, batch: int, meter: PeakMeter) -> int:
        """Peak of one step beyond what the estimate says, weights and optimizer state being there already."""
        release_memory()
        state: int = sum(tensor.numel() * tensor.element_size() for tensor in self.optimizer.state.values())
        before: int = meter.current_bytes() - self._resident - state
        meter.reset()
        self.step(batch)
        tensors = costs.module_bytes(self.index, self.index + 1, batch, accumulate=False)
        return rounded(meter.peak_bytes() - before - tensors)


def rounded(measured: int) -> int:
    """Up to a whole number of steps, at least one: so little cannot be told from nothing."""
    return max(1, -(-measured // STEP_BYTES)) * STEP_BYTES
