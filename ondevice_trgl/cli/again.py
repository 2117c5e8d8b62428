"""A command, started again in a process that holds nothing but what the command needs.

Parsing the command line takes typer and what that imports (16 MB); the C allocator can only be chosen where a process
starts. So the process that parsed replaces itself by `python -m ondevice_trgl.cli.again`; see `process`.
"""

import json
import os
import sys

from ondevice_trgl.cli.env import run_env
from ondevice_trgl.cli.evaluate import run_evaluate
from ondevice_trgl.cli.export import run_export
from ondevice_trgl.cli.guard import guarded
from ondevice_trgl.cli.plan import run_plan
from ondevice_trgl.cli.predict import run_predict
from ondevice_trgl.cli.process import ORDER, settle, take_order
from ondevice_trgl.cli.resume import run_resume
from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.cli.train import run_train

COMMANDS = {
    "plan": run_plan,
    "train": run_train,
    "resume": run_resume,
    "evaluate": run_evaluate,
    "predict": run_predict,
    "export": run_export,
    "env": run_env,
}


def main() -> int:
    """Run the command that the environment holds; returns its exit code."""
    order = json.loads(take_order(os.environ.pop(ORDER)))  # not for the processes that this one starts
    shell, given = Shell(**order["shell"]), order["given"]

    def run() -> int:
        settle(given["allocator"])
        return COMMANDS[order["command"]](shell, given)

    return guarded(run, shell)


if __name__ == "__main__":
    sys.exit(main())
