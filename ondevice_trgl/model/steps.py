"""A step of a recorded pass, and what no step can say."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Untraceable(BaseException):
    """What `forward` does here cannot be told by a list of calls; `path` is the module that does it, "" the network."""

    def __init__(self, reason: str, path: str, line: str) -> None:
        super().__init__(reason)
        self.reason, self.path, self.line = reason, path, line


class BackwardInsideError(BaseException):
    """`forward` runs a backward pass of its own, which wants what autograd keeps."""


@dataclass(frozen=True)
class Ref:
    """The result of the step of that number."""

    index: int


@dataclass
class Step:
    """One call. `op` and `target` as in torch.fx; arguments hold `Ref` where a tensor goes in."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stack: tuple[tuple[str, type], ...]
    """(path, class) of the modules whose forward makes the call, the network first."""
    line: str
    """The user's own line, as file:number."""
    pure: bool = False
    """Made of constants alone: its values are the same for every sample and in every state of the network."""
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    cut_off: bool = False
    """Made where gradients are off, of what has some."""


def found_in(value: Any, kind: type[T]) -> Iterator[T]:
    """What is of `kind` in `value`, at any depth of tuples, lists, dicts and slices."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, dict):
        yield from found_in(list(value.values()), kind)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from found_in(item, kind)
    elif isinstance(value, slice):
        yield from found_in((value.start, value.stop, value.step), kind)


def refs_in(value: Any) -> Iterator[Ref]:
    """The results of steps that `value`, an argument, refers to."""
    return found_in(value, Ref)
