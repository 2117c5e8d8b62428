"""SIGKILL at random instants, in whatever phase, again and again: each run ends with the bytes of the undisturbed one.

A run is started, killed with all its processes, and resumed (or started again, where it was still being set up), and
that some times over before it is let go to its end. Its weights have to equal those of a run that was left alone, its
folder has to hold the same files, and nothing may lie beside it once `runs clean` was called. Seeded; half an hour.

    python benchmarks/crash.py [--kills 200] [--schedule sequential|multi-lap|parallel] [--seed 0]
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "crash.json"
TRGL = [sys.executable, "-m", "ondevice_trgl"]
WORK = [
    *("--model", "resnet-small", "--data", "digits", "--image-size", "12", "--train-limit", "300", "--modules", "3"),
    *("--epochs", "3", "--budget", "450MB", "--threads", "1", "--checkpoint-every", "2steps", "--augment", "crop"),
    *("--views", "2", "--baseline", "skip", "--progress", "none"),
]
SCHEDULES = {"sequential": [], "multi-lap": ["--schedule", "multi-lap", "--laps", "2"], "parallel": []}
SCHEDULES["parallel"] = ["--schedule", "parallel"]
KILLS_A_RUN = 4
IGNORED = {"events.jsonl"}
"""Of a run that was disturbed, another tale is told."""


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*TRGL, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finished(arguments: list[str]) -> float:
    """Seconds that the command took. Ends the benchmark where it fails."""
    began = time.perf_counter()
    process = start(arguments)
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}:\n{errors.decode(errors='replace')}")
    return time.perf_counter() - began


def killed(arguments: list[str], after: float) -> bool:
    """Whether it was killed; False where it had ended by itself. Ends the benchmark where that was with an error."""
    process = start(arguments)
    try:
        _, errors = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}:\n{errors.decode(errors='replace')}")
    return False


def phase(run: Path) -> str:
    """What the run was last known to do."""
    if not (run / "config.json").is_file():
        return "setting up"
    try:
        lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
        last = json.loads(lines[-1])["event"] if lines else "planned"
    except (OSError, ValueError):
        return "just set up"
    return f"behind {last}"


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} - IGNORED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--schedule", choices=SCHEDULES, default="sequential")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    work = [*WORK, *SCHEDULES[asked.schedule]]
    phases: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="trgl-crash-") as place:
        folder = Path(place)
        whole, run = folder / "whole", folder / "run"
        train_seconds = finished(["train", *work, "-o", str(whole)])
        weights, expected = (whole / "model.safetensors").read_bytes(), files(whole)
        resume_seconds = train_seconds / 2
        runs = kills = 0
        while kills < asked.kills:
            runs += 1
            train = ["train", *work, "-o", str(run), "--force"]
            for _ in range(KILLS_A_RUN):
                begun = (run / "config.json").is_file()
                command = ["resume", str(run), "--progress", "none"] if begun else train
                if not killed(command, draw.uniform(0.0, resume_seconds if begun else train_seconds)):
                    break
                kills += 1
                phases[phase(run)] += 1
            begun = (run / "config.json").is_file()
            finished(["resume", str(run), "--progress", "none"] if begun else train)
            if (run / "model.safetensors").read_bytes() != weights:
                raise SystemExit(f"other weights after {kills} kills (seed {asked.seed}); the run is in {run}")
            if files(run) != expected:
                raise SystemExit(f"other files after {kills} kills: {sorted(files(run) ^ expected)}")
            finished(["runs", "clean", str(folder)])
            if stray := sorted(path.name for path in folder.iterdir() if path not in (whole, run)):
                raise SystemExit(f"left behind after {kills} kills: {stray}")
            finished(["runs", "clean", "--all", "--yes", str(run)])
            print(f"{kills} kills in {runs} runs, all the same bytes", file=sys.stderr, flush=True)
    record = {"kills": kills, "runs": runs, "seed": asked.seed, "killed": dict(sorted(phases.items()))}
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps(known | {asked.schedule: record}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
