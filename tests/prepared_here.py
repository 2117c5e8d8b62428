"""Jobs without their child process: the same work in this one, so that a test need not import torch once more."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from ondevice_trgl import jobs, preparation
from ondevice_trgl.child import Ended
from ondevice_trgl.errors import TrglError, from_record, to_record
from ondevice_trgl.runtime.guards import global_state_kept


def _ask(module: str, request: dict[str, Any]) -> Ended:
    assert module == preparation.__name__
    with global_state_kept(None):
        try:
            return Ended(json.loads(json.dumps(preparation._work(json.loads(json.dumps(request))))), 0, "")
        except TrglError as error:
            raise from_record(json.loads(json.dumps(to_record(error)))) from None


@contextlib.contextmanager
def prepared_here() -> Iterator[None]:
    """Whoever prepares a run inside does so in this process. Requests, answers and errors pass through JSON."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "ask", _ask)
        yield
