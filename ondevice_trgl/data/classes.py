"""What datasets that callers bring say of their classes, and whether two of them mean the same by a number."""

from collections.abc import Mapping, Sequence
from typing import Any

from ondevice_trgl.errors import DataError

MOST_NAMED = 10
_MOST_UNSTATED = 100_000
"""Classes that nobody stated, and that the samples are too few for."""
_MOST_STATED = 10_000_000


def stated_classes(dataset: Any, *, name: str) -> tuple[str, ...] | None:
    """Class names from the attribute `classes` or `num_classes` of the dataset or of those that it wraps.

    Of a number of classes, the numbers. Raises DataError where several wrapped ones do not mean the same.
    """
    seen: list[Any] = []
    while dataset is not None and not any(dataset is other for other in seen):
        seen.append(dataset)
        classes, count = _attribute(dataset, "classes", name), _attribute(dataset, "num_classes", name)
        if isinstance(classes, tuple | list) and classes:
            return tuple(map(str, classes))
        if isinstance(count, int) and not isinstance(count, bool) and count > 0:
            if count > _MOST_STATED:
                raise DataError(
                    f"{name} states {count} classes; expected at most {_MOST_STATED}", hint="mend num_classes"
                )
            return tuple(map(str, range(count)))
        several = _attribute(dataset, "datasets", name)
        if isinstance(several, tuple | list):
            parts = [(f"part {k} of {name}", stated_classes(one, name=name)) for k, one in enumerate(several)]
            parts.sort(key=lambda part: -len(part[1] or ()))  # one may have the first classes of another alone
            check_alike(dict(parts))
            return parts[0][1] if parts else None
        dataset = _attribute(dataset, "dataset", name)
    return None


def _attribute(dataset: Any, attribute: str, name: str) -> Any:
    """That of `dataset`; None where it has none. A property is the user's code, which may raise anything."""
    try:
        return getattr(dataset, attribute, None)
    except Exception as error:
        raise DataError(
            f"{name}: its attribute {attribute!r} cannot be read: {type(error).__name__}: {error}",
            hint=f"let {attribute!r} be a list of names, or leave it out" if attribute == "classes" else "",
        ) from error


def check_alike(stated: Mapping[str, tuple[str, ...] | None]) -> None:
    """Raises DataError where datasets, by name and the one to train on first, mean different classes by one number.

    Those that state no names, or numbers alone, are left out. A set may have the first few classes only.
    """
    named = {what: names for what, names in stated.items() if names is not None and not _only_numbers(names)}
    if len(named) < 2:
        return
    (first, expected), *others = named.items()
    for what, names in others:
        if names == expected[: len(names)]:
            continue
        if unknown := [name for name in names if name not in expected]:
            raise DataError(
                f"{what} has classes that {first} has not: {listing(unknown)}",
                hint=f"the classes of {first} are {listing(expected)}",
            )
        at = next(index for index, name in enumerate(names) if name != expected[index])
        how = "in another order" if sorted(names) == sorted(expected) else "with numbers of its own"
        raise DataError(
            f"{what} has the classes of {first} {how}: {listing(names)}; expected {listing(expected)}",
            hint=f"label {at} is {names[at]} in one and {expected[at]} in the other: number the classes alike in both",
        )


def check_names(names: Sequence[str] | None, outputs: int, name: str) -> None:
    """Raises DataError where a dataset of targets states another number of names than it has targets a sample."""
    if names is not None and len(names) != outputs:
        raise DataError(
            f"{name} states {len(names)} names ({listing(names)}) and has {outputs} targets a sample",
            hint="let its `classes` name every target, in their order, or leave it out",
        )


def _only_numbers(names: Sequence[str]) -> bool:
    return all(name == str(index) for index, name in enumerate(names))


def numbered_classes(highest: int, *, samples: int, name: str) -> tuple[str, ...]:
    """Names of classes that nobody stated: 0 to the highest label. Raises DataError for a label that can be none."""
    if highest >= max(_MOST_UNSTATED, samples):
        raise DataError(
            f"{name}: the highest label is {highest}, of {samples} samples; expected the number of a class",
            hint="number the classes from 0, or let the dataset state `classes` or `num_classes`",
        )
    return tuple(map(str, range(highest + 1)))


def listing(names: Sequence[str]) -> str:
    """`names` in a message; of many the first few."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
