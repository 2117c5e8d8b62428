"""The trained model out of a run, as a file that needs nothing of this package to be read."""

from pathlib import Path

from ondevice_trgl.errors import UsageError
from ondevice_trgl.model.tensorfile import copy_tensors, read_header
from ondevice_trgl.run.record import RunRecord
from ondevice_trgl.run.run_dir import RECORD, write_json
from ondevice_trgl.run.trained import TrainedRun

FORMATS = ("state-dict",)


def export_run(run_dir: Path, *, format: str, head: str | int, output: Path, force: bool = False) -> Path:
    """Write the trained weights of `run_dir` to `output`, and what its data were beside it; returns `output`.

    state-dict: safetensors under the names of the user's own model. With an auxiliary head, the weights of the layers
    up to it, and the head's behind the prefix `head.`. Copied a megabyte at a time: no tensor is ever in memory whole.
    Class names, shape of an input, resizing, mean and spread are in the file's metadata (key `preprocessing`), and the
    same JSON object is in `beside(output)`.
    Raises UsageError, RunDirError, StorageError.
    """
    if format not in FORMATS:
        raise UsageError(f"format {format!r} is unknown", hint=f"formats: {', '.join(FORMATS)}")
    trained = TrainedRun.open(run_dir)
    run, index = trained.run, trained.head(head)
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
    sources = {}
    if index == trained.plan.num_parts - 1:
        sources = {name: (run.model, name) for name in read_header(run.model)[0]}
    for k in range(index + 1 if not sources else 0):
        file = run.modules / f"{k:03d}.safetensors"
        for name in read_header(file)[0]:
            if name.startswith("module."):
                sources[name.removeprefix("module.")] = (file, name)
            elif k == index and name.startswith("head."):
                sources[name] = (file, name)
    copy_tensors(output, sources, record.metadata)
    if record.preprocessing:
        write_json(beside(output), dict(record.preprocessing))
    return output


def beside(output: Path) -> Path:
    """Where an export says what its inputs and outputs are: `model.json` for `model.safetensors`."""
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.json")
