"""From a dataset as it was found to three sets that can be trained on: split, limited, checked, kept."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ondevice_trgl.buffers import bytes_of
from ondevice_trgl.data.bundle import Asked, DataBundle
from ondevice_trgl.data.classes import check_alike, check_names, numbered_classes, stated_classes
from ondevice_trgl.data.images import ImageSet, PixelStats, StoredSet, all_alike, pixel_stats
from ondevice_trgl.data.preprocessing import BILINEAR, NONE, Preprocessing
from ondevice_trgl.data.records import IN_MEMORY_BYTES, Records, hash_records, keep_records
from ondevice_trgl.data.samples import Samples, described
from ondevice_trgl.data.source import Part, Source
from ondevice_trgl.data.splits import check_labels, check_task, check_zero_used, tenth
from ondevice_trgl.data.targets import Targets
from ondevice_trgl.data.user import Scanned, UserSet, fingerprint, scan
from ondevice_trgl.errors import DataError

_SPLITS = ("train", "val", "test")


class _Kept(NamedTuple):
    records: Records
    slots: Tensor
    labels: Tensor


def assemble(source: Source, asked: Asked, stats: PixelStats | None = None) -> DataBundle:
    """Split, limit and keep the records of `source`, normalised by `stats` or else by those of what is trained on.

    Raises DataError where its labels cannot be trained on, or its pixels are all the same.
    """
    check_task(source.task, asked.task, asked.name)
    stored, shape = source.shape, asked.delivered(source.shape)
    assert len(shape) == 3
    digest = hashlib.blake2b(repr((stored, shape)).encode(), digest_size=16)
    part = source.train
    check_labels(part.labels, len(source.class_names), what=f"{asked.name} (train)")
    carved = (
        None if source.val is not None else source.val_count or tenth(len(part.labels)),
        None if source.test is not None else source.test_count or tenth(len(part.labels)),
    )
    kept = _keep(part, asked.split(part.labels, carved, source.class_names), stored, asked, digest)
    train = kept["train"]
    stats = stats.stored(stored[0]) if stats is not None else pixel_stats(train.records, train.slots, stored)
    if stats.constant:
        raise all_alike(asked.name, len(train.slots), *stats.mean)
    digest.update(repr(stats).encode())
    for name, opened in (("val", source.val), ("test", source.test)):
        if opened is not None:
            part = opened()
            check_labels(part.labels, len(source.class_names), what=f"{asked.name} ({name})")
            positions = asked.limit(torch.arange(len(part.labels)), part.labels, split=name)
            kept |= _keep(part, {name: positions}, stored, asked, digest)
    sets = {name: StoredSet(*kept[name], stored=stored, shape=shape, stats=stats) for name in _SPLITS}
    for one in sets.values():
        one.task = source.task
    stretched = shape[1:] != stored[1:]
    resize = source.resize if not stretched else BILINEAR if source.resize == NONE else source.resize
    preprocessing = Preprocessing(
        source.class_names, shape, resize, source.orientation,
        stats.over(shape[0]).mean, stats.over(shape[0]).std, source.task,
    )  # fmt: skip
    return _bundle(asked, source.origin, preprocessing, stored, sets, digest)


def _keep(
    part: Part, positions: Mapping[str, Tensor], stored: tuple[int, int, int], asked: Asked, digest: "hashlib.blake2b"
) -> dict[str, _Kept]:
    """Keep the records at all those positions of `part`, once; where they lie, for each split.

    Many that lie in a file already stay there.
    """
    wanted = torch.cat(list(positions.values())).sort().values
    record_bytes = stored[0] * stored[1] * stored[2]
    stay = part.records is not None and len(wanted) * record_bytes > IN_MEMORY_BYTES
    if part.records is not None and stay:
        records = part.records()
        hash_records(records, wanted, record_bytes, digest)
    else:
        records = keep_records(part.stream(), wanted, record_bytes, scratch_dir=asked.scratch_dir, digest=digest)
    kept = {}
    for name, chosen in positions.items():
        slots, labels = torch.searchsorted(wanted, chosen), part.labels[chosen]
        digest.update(name.encode())
        digest.update(bytes_of(slots))
        digest.update(bytes_of(labels))
        kept[name] = _Kept(records, chosen if stay else slots, labels)
    return kept


def assemble_user(returned: Any, asked: Asked) -> DataBundle:
    """Split, limit and wrap what a caller's function returned: a dataset, or (train, val[, test]).

    Reads every sample once. Pixels go into the digest as `fingerprint` says. Raises DataError where it is neither, or
    where samples or labels are malformed.
    """
    parts = returned if isinstance(returned, tuple) else (returned,)
    if isinstance(returned, Mapping) or not 1 <= len(parts) <= 3:
        what = described(returned) if isinstance(returned, Mapping) else f"{len(parts)} datasets"
        raise DataError(
            f"{asked.name} returned {what}; expected a dataset or (train, val[, test])",
            hint="return the datasets themselves, as a tuple in that order",
        )
    names = [f"{asked.name} ({split})" for split in _SPLITS[: len(parts)]]
    samples: list[Samples] = []
    scanned: list[Scanned] = []
    for dataset, name in zip(parts, names, strict=True):
        targets = Targets(samples[0].targets.kind, samples[0].targets.width) if samples else Targets(asked.task)
        samples.append(Samples(dataset, name=name, shape=samples[0].shape if samples else None, targets=targets))
        scanned.append(scan(samples[-1]))
    labels = [one.labels for one in scanned]
    stated = [stated_classes(dataset, name=name) for dataset, name in zip(parts, names, strict=True)]
    check_alike(dict(zip(names, stated, strict=True)))
    given, classes = samples[0].shape, stated[0]
    assert given is not None
    task, width = samples[0].targets.kind, samples[0].targets.width
    if width is not None:
        for given_names, name in zip(stated, names, strict=True):
            check_names(given_names, width, name)
        classes = classes or tuple(map(str, range(width)))
    elif classes is None:
        check_zero_used(labels[0], what=names[0])
        classes = numbered_classes(int(labels[0].max()), samples=len(labels[0]), name=names[0])
    for some, name in zip(labels, names, strict=True):
        check_labels(some, len(classes), what=name)
    if scanned[0].constant is not None:
        raise all_alike(names[0], samples[0].count, scanned[0].constant, kind="number")
    shape = asked.delivered(given)
    digest = hashlib.blake2b(repr((asked.name, given, shape)).encode(), digest_size=16)
    for one in samples:
        fingerprint(one, digest)
    carved = tuple(None if index < len(parts) else tenth(len(labels[0])) for index in (1, 2))
    chosen = {split: (0, positions) for split, positions in asked.split(labels[0], carved, classes).items()}
    for index in range(1, len(parts)):
        positions = asked.limit(torch.arange(len(labels[index])), labels[index], split=_SPLITS[index])
        chosen[_SPLITS[index]] = (index, positions)
    sets = {}
    for split in _SPLITS:
        index, positions = chosen[split]
        own = labels[index][positions]
        digest.update(split.encode())
        digest.update(bytes_of(positions.contiguous()))
        digest.update(bytes_of(own))
        sets[split] = UserSet(
            samples[index], own, positions, shape=shape, num_classes=len(classes), whole=scanned[index].whole
        )
        sets[split].class_names = stated[0]
    preprocessing = Preprocessing(classes, shape, NONE if shape[1:] == given[1:] else BILINEAR, task=task)
    return _bundle(asked, f"datasets of {asked.name}", preprocessing, given, sets, digest)


def _bundle(
    asked: Asked,
    origin: str,
    preprocessing: Preprocessing,
    given: tuple[int, ...],
    sets: Mapping[str, ImageSet],
    digest: "hashlib.blake2b",
) -> DataBundle:
    train, val, test = (sets[split] for split in _SPLITS)
    sizes: Sequence[int] = (len(train), len(val), len(test))
    return DataBundle(
        name=asked.name,
        train=train,
        val=val,
        test=test,
        preprocessing=preprocessing,
        description=asked.describe(given, sizes, preprocessing.class_names, train.labels, origin, preprocessing.task),
        digest=digest.hexdigest(),
    )
