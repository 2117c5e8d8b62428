"""Jobs without their child processes: the same work in this one, so that a test need not import torch twice more."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ondevice_trgl import jobs, measuring, preparation
from ondevice_trgl.device.limit import NoLimit
from ondevice_trgl.errors import TrglError, from_record, to_record
from ondevice_trgl.processes import Ended
from ondevice_trgl.run.guards import global_state_kept

_WORK = {measuring.__name__: measuring._measure, preparation.__name__: preparation._prepare}


def _through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _ask(module: str, request: dict[str, Any]) -> Ended:
    with global_state_kept(torch.get_num_threads()):
        try:
            return Ended(_through_json(measuring.as_helper(_through_json(request), _WORK[module])), 0, "")
        except TrglError as error:
            raise from_record(_through_json(to_record(error))) from None


@contextlib.contextmanager
def prepared_here() -> Iterator[None]:
    """Whoever prepares a run inside does so in this process. Requests, answers and errors pass through JSON.

    The budget is measured and not enforced: a limit would be that of the process that runs the tests.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "ask", _ask)
        patch.setattr(measuring, "limit_for", lambda device: NoLimit())
        yield
