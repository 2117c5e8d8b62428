"""What a user names as `pkg.module:callable`, looked for in the folder that the user is in as well."""

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ondevice_trgl.errors import UsageError, first_line


@contextlib.contextmanager
def found_here() -> Iterator[None]:
    """In this context imports look into the working directory first, as `python -m` does and a console script not."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:  # what was imported may have taken it away
            sys.path.remove(here)


def name_of(function: str | Callable[..., Any]) -> str:
    """pkg.module:callable of a function, or the name that it is given by already."""
    if isinstance(function, str):
        return function
    known = function if hasattr(function, "__qualname__") else type(function)
    return f"{known.__module__}:{known.__qualname__}"


def function_named(name: str, what: str, takes: str) -> Callable[..., Any]:
    """The function pkg.module:callable, a `what` of two arguments, which are called `takes`. Raises UsageError."""
    place, _, attribute = name.partition(":")
    try:
        with found_here():
            found: Any = importlib.import_module(place)
            for part in attribute.split("."):
                found = getattr(found, part)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise UsageError(
            f"{what} {name!r} cannot be imported: {first_line(error)}",
            hint="write it as pkg.module:callable, importable from here",
        ) from error
    if not callable(found):
        raise UsageError(
            f"{what} {name!r} is {type(found).__name__}, expected a callable", hint=f"name a function of ({takes})"
        )
    function: Callable[..., Any] = found
    return function
