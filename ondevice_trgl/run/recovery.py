"""Checkpoints that a disk has damaged: what is taken in their place, so that training ends with the same weights."""

from ondevice_trgl.config import TrainConfig
from ondevice_trgl.errors import DamagedFileError
from ondevice_trgl.model.module_files import ModuleFiles
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.run.run_dir import WEIGHTS, RunDir


def mend(run: RunDir, files: ModuleFiles, plan: Plan, config: TrainConfig) -> tuple[str, ...]:
    """Let damaged checkpoints of a run that is not completed be those from before, or let their modules start again.

    Whatever is trained once more comes out as it was, bit for bit: the boundary in front of it is the same, and so are
    its order and its random numbers. For the one who writes. Returns what was done, in words. Raises DamagedFileError
    where neither is possible.
    """
    damaged = [] if run.model.is_file() else files.damaged()
    if not damaged:
        return ()
    side_by_side = set(range(plan.passed, plan.num_modules)) if config.schedule == "parallel" else set()
    if side_by_side & set(damaged):  # they were saved together, and go back together
        # the damaged last: where this is cut off, it is found and done again
        damaged = [*sorted(side_by_side - set(damaged)), *damaged]
    # what patience keeps of the best epoch is not kept for two checkpoints
    has_before = config.patience is None and all(map(files.has_before, damaged))
    if not has_before and (config.laps > 1 or not (run.path / WEIGHTS).is_file()):
        raise DamagedFileError(
            f"{files.path(damaged[0])} is damaged, and nothing that was saved before it is left",
            hint="bring it back from a copy, or start a new run",
        )
    to = "the checkpoint before" if has_before else "its start"
    for index in damaged:
        if has_before:
            files.take_before(index)
        else:
            files.drop(index)
        run.event("mended", module=index, to=to)
    return tuple(f"what was saved of module {index} was damaged on disk: it went on from {to}" for index in damaged)
