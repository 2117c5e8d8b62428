"""Runs set up without processes of their own: the same work in this one, so that a test need not import torch again."""

import functools
import json
from typing import Any

import pytest
import torch

import ondevice_trgl
from ondevice_trgl import jobs
from ondevice_trgl.data import prepare_child
from ondevice_trgl.device.limit import NoLimit
from ondevice_trgl.errors import TrglError, from_record, to_record
from ondevice_trgl.run.guards import global_state_kept
from ondevice_trgl.setup import helper, planning, staging
from ondevice_trgl.setup.requests import PlanRequest, StageRequest


def _through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def ask_here(name: str, request: dict[str, Any], **_: Any) -> dict[str, Any]:
    """`processes.ask`, answered by this process. Requests, answers and errors pass through JSON.

    The budget is measured and not enforced: a limit would be that of the process that runs the tests.
    """
    values = _through_json(request)
    with pytest.MonkeyPatch.context() as patch, global_state_kept(torch.get_num_threads()):
        patch.setattr(helper, "limit_for", lambda device: NoLimit())
        try:
            if name == "prepare":
                answer = prepare_child.prepare(values)
            elif name == "stage":
                answer = staging._stage(StageRequest.from_dict(values))
            else:
                answer = planning._plan(PlanRequest.from_dict(values))
        except TrglError as error:
            raise from_record(_through_json(to_record(error))) from None
        result = _through_json(answer)
        assert isinstance(result, dict)
        return result


Trainer = functools.partial(ondevice_trgl.Trainer, ask=ask_here)
plan_job = functools.partial(jobs.plan_job, ask=ask_here)
train_job = functools.partial(jobs.train_job, ask=ask_here)
