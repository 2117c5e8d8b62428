"""Numbers that a network counts with in Python: which of them a pass changes, and what they would be much later."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ondevice_trgl.model.untouched import containers_of, own_modules

_AHEAD = 1_000_003
"""Passes that a number is put ahead by."""
Place = tuple[int, Any]
"""What holds a number (by id), and under which key."""


class Numbers:
    """The whole and real numbers that modules hold, and the lists and dicts in them, at one time."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = {place: value for place, (_, value, _) in self._found().items()}

    def changed(self) -> dict[Place, tuple[Any, str]]:
        """Of those that are others now: by how much, and their name."""
        moved = {}
        for place, (_, value, name) in self._found().items():
            before = self._before.get(place)
            if before is not None and before != value and value == value:
                moved[place] = (value - before, name)
        return moved

    def put_ahead(self, moved: Mapping[Place, tuple[Any, str]]) -> None:
        """As they would be after very many passes."""
        for place, (holder, value, _) in self._found().items():
            if place in moved:
                holder[place[1]] = value + moved[place][0] * _AHEAD

    def _found(self) -> dict[Place, tuple[Any, Any, str]]:
        paths = {id(module): path for path, module in self._model.named_modules()}
        holders: list[tuple[Any, str]] = [(m.__dict__, paths[id(m)]) for m in own_modules(self._model)]
        holders += [(c, name) for c, name in containers_of(self._model) if isinstance(c, dict | list)]
        found: dict[Place, tuple[Any, Any, str]] = {}
        for holder, name in holders:
            for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
                if isinstance(value, int | float) and not isinstance(value, bool):
                    found[id(holder), key] = (holder, value, f"{name}.{key}" if name else str(key))
        return found
