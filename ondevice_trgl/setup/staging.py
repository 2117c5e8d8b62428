"""Stage: a model, or a callable that makes one, becomes files in a folder: blueprint and weights.

Whoever goes on with the folder needs neither the model's code nor the memory of its weights.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ondevice_trgl.config import DEFAULTS, TrainConfig
from ondevice_trgl.data.images import ImageSet
from ondevice_trgl.data.preprocessing import Preprocessing
from ondevice_trgl.device.allocator import release_memory
from ondevice_trgl.device.pages import release_code_pages
from ondevice_trgl.errors import DataError, PartitionError, UsageError
from ondevice_trgl.model.blueprint import NoBlueprint, to_blueprint
from ondevice_trgl.model.filed import weights_in_file
from ondevice_trgl.model.partition import LocalModule, segments_of
from ondevice_trgl.model.proof import prove
from ondevice_trgl.model.store import aliases_of, evict, parameter_count, state_of
from ondevice_trgl.model.tensorfile import write_tensors
from ondevice_trgl.model.trace import Chain
from ondevice_trgl.model.tuning import check_is_classifier, tuned
from ondevice_trgl.model.weights import Filled
from ondevice_trgl.plan.estimate import estimate
from ondevice_trgl.plan.falsify import estimate_scale
from ondevice_trgl.plan.fewest import check_norms
from ondevice_trgl.plan.memo import Memo
from ondevice_trgl.processes import answer
from ondevice_trgl.run.batches import Source
from ondevice_trgl.run.guards import outline
from ondevice_trgl.run.inputs import example_of
from ondevice_trgl.run.opening import chain_of, kind_of, sources
from ondevice_trgl.run.record import RunRecord
from ondevice_trgl.run.run_dir import BLUEPRINT, COSTS, FORMAT, NAMES, RECORD, WEIGHTS
from ondevice_trgl.setup.helper import Helper, as_helper
from ondevice_trgl.setup.requests import StageRequest
from ondevice_trgl.workload import build_for, fill_weights, load_bundle

Made = nn.Module | Callable[[], nn.Module]
Fill = Callable[[nn.Module, Callable[[], None]], None]
"""Gives a model that was just made other weights; calls its second argument behind every few megabytes."""


_LARGEST_GRADIENT_BYTES = 64 << 20
"""The proof computes no gradient of a larger parameter: the budget may have no room for it beside the weights."""


def give_back() -> None:
    """Give back what is not in use."""
    release_memory()
    release_code_pages()


@dataclass(frozen=True)
class Named:
    """A network of torchvision's or ours: its code is known, and one proof on this machine is enough."""

    name: str
    memo: Memo

    def is_proved(self, chain: Chain) -> bool:
        """Whether it was proved before, with the same versions, shapes and number of classes."""
        return self.memo.get("proved", self.name, **self._key(chain)) is not None

    def note(self, chain: Chain) -> None:
        """Remember that it is proved."""
        self.memo.put("proved", self.name, 1.0, **self._key(chain))

    @staticmethod
    def _key(chain: Chain) -> dict[str, Any]:
        library = getattr(sys.modules.get("torchvision"), "__version__", "")
        known = {"input": chain.in_shape, "dtype": str(chain.in_dtype), "classes": chain.num_outputs}
        still = {"still": len(chain.modes.kept)} if chain.modes.kept else {}
        return {**known, "library": library, **still}


@contextlib.contextmanager
def built(
    made: Made,
    data: dict[str, Source],
    folder: Path,
    config: TrainConfig,
    fill: Fill | None = None,
    named: Named | None = None,
    proof: bool = True,
    between: Callable[[], None] = give_back,
) -> Iterator[tuple[Chain, Callable[[], None]]]:
    """(chain, release) of a model that is there, or is made here with its weights in a file in `folder`.

    `release()` drops from memory what of the weights was touched; a model that was there stays as it is. The chain is
    proved to be the model, before `config` freezes anything, but for `named` ones that are known to be, and without
    `proof`; `between` is called between two passes.
    Raises UsageError, PartitionError, DataError, StorageError.
    """
    if isinstance(made, nn.Module):
        chain = chain_of(made, data, config)
        example = example_of(data["train"], chain.in_dtype)
        prove(chain, segments_of(chain), example, folder=folder, largest_bytes=_LARGEST_GRADIENT_BYTES)
        yield tuned(chain, config), lambda: None
        return
    with weights_in_file(folder) as filed:
        model = made()
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"the callable returned {type(model).__name__}, expected an nn.Module", hint="return the model itself"
            )
        filed.take(model)
    if fill is not None:
        fill(model, filed.release)
    release_code_pages()

    def read(parameter: Tensor) -> None:
        if filed.holds(parameter):
            filed.touching((parameter,))
            filed.touched()

    with filed.dropped_as_read():
        chain = chain_of(model, data, config)
        if proof and (named is None or not named.is_proved(chain)):
            segments, example = segments_of(chain), example_of(data["train"], chain.in_dtype)
            most = _LARGEST_GRADIENT_BYTES
            between()
            prove(chain, segments, example, folder=folder, largest_bytes=most, read=read, between=between)
            between()
        if named is not None:
            named.note(chain)
    release_code_pages()
    yield tuned(chain, config), filed.release


def stage(
    made: Made,
    data: dict[str, Source],
    record: RunRecord,
    folder: Path,
    *,
    weights: bool = True,
    fill: Fill | None = None,
    named: Named | None = None,
    between: Callable[[], None] = give_back,
) -> Chain:
    """Write the model's blueprint, weights and record into `folder`; returns its chain, evicted.

    Without `weights` those are not written: they stay in a model that is there, and are gone in one that was made here.
    Memory: of a callable's model, the tensor that is being
    initialised and some megabytes. Raises UsageError, PartitionError, DataError, StorageError.
    """
    for name in ("patience", "stop_when"):
        value = getattr(record.config, name)
        if "val" not in data and value != DEFAULTS[name]:
            raise DataError(f"{name} = {value!r}: there is no validation set to look at", hint="give fit a val_set")
    with built(made, data, folder, record.config, fill, named, between=between) as (chain, release):
        _check_trained(chain)
        _check_dense(chain)
        check_norms(chain)
        reason = ""
        try:
            _write(folder / BLUEPRINT, to_blueprint(chain))
        except NoBlueprint as error:
            reason = error.message
        if weights:
            tensors = state_of(chain.model)
            for segment in segments_of(chain):  # and the constants that forward uses
                tensors |= state_of(segment)
            write_tensors(folder / WEIGHTS, tensors, written=release)
        if weights or not isinstance(made, nn.Module):
            evict(chain.model)
        _write(folder / NAMES, {name: list(same) for name, same in aliases_of(chain.model).items()})
    release_memory()
    release_code_pages()
    known = record.preprocessing or _known_of(data, chain).to_dict()
    values = {**record.to_dict(), "data": outline(data), "preprocessing": known, "no_blueprint": reason}
    _write(folder / RECORD, {"format": FORMAT, **values})
    return chain


def _known_of(data: dict[str, Source], chain: Chain) -> Preprocessing:
    """What is known of a program's own data: its class names, or else numbers, its task, and the shape of an input."""
    stated = data["train"].class_names if isinstance(data["train"], ImageSet) else None
    names = stated or tuple(map(str, range(chain.num_outputs)))
    return Preprocessing(names, tuple(chain.in_shape), task=kind_of(data["train"]))


def _check_trained(chain: Chain) -> None:
    """Raises UsageError where nothing that the network uses is to be trained."""
    used, name = LocalModule.of(chain, 0, len(chain.segments)), type(chain.model).__name__
    count = parameter_count(used)
    if not count or used.frozen:
        frozen = f"all {count} parameters of {name} are frozen (requires_grad = False, or used under no_grad)"
        raise UsageError(
            f"nothing to train: {frozen if count else f'{name} has no parameters'}",
            hint="set requires_grad_(True) on the layers that are to learn",
        )


def _check_dense(chain: Chain) -> None:
    """Raises PartitionError for a table whose gradient would be sparse, which no update here takes."""
    for name, layer in chain.model.named_modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse and layer.weight.requires_grad:
            raise PartitionError(
                f"{name} ({type(layer).__name__}) has sparse = True; updates here take dense gradients",
                hint="make it with sparse=False, which learns the same",
            )


def measure(chain: Chain, config: TrainConfig, folder: Path) -> None:
    """Write into `folder` what the pieces of `chain` take. Memory: one piece and its activations at batch 4."""
    _write(folder / COSTS, estimate(chain, config).to_dict())


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def _stage(request: StageRequest) -> dict[str, Any]:
    job, given = request.job, request.job.workload

    def work(helper: Helper) -> None:
        bundle = load_bundle(job.workload, job.config.seed, request.folder.parent, task=job.config.asked_task)
        data = sources(bundle.train, bundle.val, bundle.test)
        subject: dict[str, Any] = {
            "description": bundle.description,
            "digest": bundle.digest,
            "input_shape": list(bundle.input_shape),
            "num_classes": bundle.num_classes,
            "samples": {name: len(split.labels) for name, split in data.items()},
        }
        record = RunRecord(
            job.config,
            {},
            job.workload,
            subject,
            bundle.preprocessing.to_dict(),
            job.baseline,
            job.command,
            job.allocator,
            job.stated,
            job.why_budget,
            beside=job.beside,
            flash_endurance_bytes=job.flash_endurance_bytes,
        )

        filled: list[Filled] = []

        def fill(model: nn.Module, release: Callable[[], None]) -> None:
            helper.limit.lift()  # a mapping of the file counts there as if it were memory
            try:  # known once they are read, and before the record is written
                filled.append(fill_weights(given, model, bundle.num_classes, release))
                subject["weights_digest"] = filled[0].digest
                if filled[0].why:
                    subject["weights_left"] = filled[0].why
            finally:
                helper.limit.set(helper.room_bytes)

        def between() -> None:
            helper.limit.set(helper.room_bytes)  # it sees how much code is in memory now, and keeps room for that
            give_back()

        chain = stage(
            lambda: build_for(job.workload, bundle, job.config.seed),
            data,
            record,
            request.folder,
            weights=request.weights,
            fill=None if given.weights is None else fill,
            # a planner that is wrong on purpose knows nothing from before
            named=None if ":" in given.model or estimate_scale() != 1.0 else Named(given.model, helper.memo),
            between=between,
        )
        helper.limit.set(helper.room_bytes)
        if filled and filled[0].left:
            check_is_classifier(chain, filled[0].left, filled[0].why)
        # tracing and proving leave kernels and threads behind: where it can, the process that plans measures
        if not (request.folder / BLUEPRINT).is_file():
            measure(chain, job.config, request.folder)

    return vars(as_helper(job.config, request.folder, request.caller_bytes, job.allocator, work))


if __name__ == "__main__":
    raise SystemExit(answer(lambda values: _stage(StageRequest.from_dict(values))))
