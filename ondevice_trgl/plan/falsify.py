"""A hook for tests of enforcement: a planner that is wrong on purpose.

With TRGL_TEST_ESTIMATE_SCALE=0.7 in the environment the planner believes that a module takes, above the floor, 0.7 of
what is estimated; nothing is rehearsed or remembered that would correct it. What then holds the budget is what holds it
while training. The plan says so in its reasons. For tests alone; processes that plan inherit it.
"""

import math
import os
from collections.abc import Mapping

from ondevice_trgl.errors import UsageError

VARIABLE = "TRGL_TEST_ESTIMATE_SCALE"


def estimate_scale(environment: Mapping[str, str] = os.environ) -> float:
    """What estimates above the floor are multiplied with; 1.0 unless the hook is set. Raises UsageError."""
    text = environment.get(VARIABLE, "1")
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 0 < scale < math.inf:
        raise UsageError(f"{VARIABLE} is {text!r}, expected a number above 0", hint="for example 0.7")
    return scale


def falsified(scale: float) -> list[str]:
    """The reason that a plan gives for its figures where they were scaled."""
    if scale == 1.0:
        return []
    return [
        f"estimates above the floor were multiplied by {scale:g}, and none rehearsed: {VARIABLE}, a test hook, is set"
    ]
