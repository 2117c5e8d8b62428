"""What a user names as `pkg.module:callable`, looked for in the folder that the user is in as well."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path


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
