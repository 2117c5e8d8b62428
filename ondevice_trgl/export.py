"""The trained model out of a run, as a file that needs nothing of this package to be read."""

from pathlib import Path

from ondevice_trgl.durable import write_json
from ondevice_trgl.errors import RunDirError, UsageError
from ondevice_trgl.model.header import read_header
from ondevice_trgl.model.tensorfile import copy_tensors
from ondevice_trgl.run.record import RunRecord
from ondevice_trgl.run.run_dir import RECORD
from ondevice_trgl.run.trained import TrainedRun

FORMATS = ("state-dict",)
_MOST_TRIES = 3
"""To read a run that is training, before it is refused."""


def export_run(run_dir: Path, *, format: str, head: str | int, output: Path, force: bool = False) -> Path:
    """Write the trained weights of `run_dir` to `output`, and what its data were beside it; returns `output`.

    state-dict: safetensors under the names of the user's own model. With an auxiliary head, the weights of the layers
    up to it, and the head's behind the prefix `head.`. Copied a megabyte at a time: no tensor is ever in memory whole.
    Class names, shape of an input, resizing, mean and spread are in the file's metadata (key `preprocessing`), and the
    same JSON object is in `beside(output)`.
    The run may be training: of the heads that are finished, those of one lap together. Raises UsageError, RunDirError,
    StorageError.
    """
    if format not in FORMATS:
        raise UsageError(f"format {format!r} is unknown", hint=f"formats: {', '.join(FORMATS)}")
    trained = TrainedRun.open(run_dir)
    run, _ = trained.run, trained.head(head)
    if output.is_dir():
        raise UsageError(f"{output} is a folder, expected a file", hint="choose another output")
    if output.exists() and not force:
        raise UsageError(f"{output} exists", hint="--force overwrites it")
    record = run.load(RECORD, RunRecord.from_dict)
    if record.preprocessing and beside(output).exists() and not force:
        raise UsageError(f"{beside(output)} exists, where the class names go", hint="--force overwrites both files")
    if record.preprocessing and beside(output).is_dir():
        raise UsageError(f"{beside(output)} is a folder, where the class names go", hint="choose another output")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"{output.absolute().parent} is no folder", hint="make it, or choose another output")
    for _ in range(_MOST_TRIES):
        trained = TrainedRun.open(run_dir)
        sources = _sources(trained, trained.head(head))
        files = sorted({file for file, _ in sources.values()})
        before = [_version(file) for file in files]
        copy_tensors(output, sources, record.metadata)
        if [_version(file) for file in files] == before:
            break
    else:
        output.unlink(missing_ok=True)
        raise RunDirError(f"{run_dir} changed while it was read", hint="try again: it is in the middle of a lap")
    if record.preprocessing:
        write_json(beside(output), dict(record.preprocessing))
    return output


def _sources(trained: TrainedRun, index: int) -> dict[str, tuple[Path, str]]:
    """By name in the export: file and name there. The last head is the whole network's."""
    run = trained.run
    if index == trained.plan.num_parts - 1:
        return {name: (run.model, name) for name in read_header(run.model)[0]}
    sources = {}
    for k in range(index + 1):
        file = run.modules / f"{k:03d}.safetensors"
        for name in read_header(file)[0]:
            if name.startswith("module."):
                sources[name.removeprefix("module.")] = (file, name)
            elif k == index and name.startswith("head."):
                sources[name] = (file, name)
    return sources


def _version(file: Path) -> tuple[int, int]:
    """Which file it is: a checkpoint puts another one in its place."""
    status = file.stat()
    return status.st_ino, status.st_mtime_ns


def beside(output: Path) -> Path:
    """Where an export says what its inputs and outputs are: `model.json` for `model.safetensors`."""
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.json")
