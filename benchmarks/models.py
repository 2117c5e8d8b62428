"""Which networks are cut, and whether what is cut is the network: torchvision, timm, Hugging Face.

Each network, with random weights, in a process of its own: it is traced, cut where one tensor crosses, proved against
itself (eval and train output, gradients, buffers), trained for two steps of 8 samples in two modules, and the accuracy
that the report says of the last head is measured again on the exported network. With --budgets the smallest budget at
batch 16 too; with --quick networks are proved and not trained. Writes results/models.json, row by row; a row that is
there is not made again without --again.

    python benchmarks/models.py [--of torchvision,timm,huggingface] [--only NAME,...] [--again] [--budgets] [--quick]
    python benchmarks/models.py --table

Needs `pip install 'ondevice_trgl[models]'`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ondevice_trgl._torchvision import torchvision_module

RESULTS = Path(__file__).parent / "results" / "models.json"
CLASSES, BATCH = 10, 8
SECONDS = 600
"""For one network."""
LIBRARIES = ("torchvision", "timm", "huggingface")


class Noise(Dataset[tuple[Tensor, int]]):
    """Two batches to train on, of pictures or of token ids."""

    def __init__(self, shape: tuple[int, ...], ids: int, count: int = 2 * BATCH) -> None:
        numbers = torch.Generator().manual_seed(0)
        self.inputs = (
            torch.randint(0, ids, (count, *shape), generator=numbers)
            if ids
            else torch.randn(count, *shape, generator=numbers)
        )

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], index % CLASSES


def named(library: str) -> list[str]:
    """The networks of a library, as the table has them."""
    lists = json.loads((Path(__file__).parent / "models.json").read_text(encoding="utf-8"))
    found: list[str] = lists[library]
    return found


def made(library: str, name: str) -> tuple[nn.Module, tuple[int, ...], int]:
    """(network, shape of a sample, number of token ids or 0)."""
    torch.manual_seed(0)
    torchvision_module()  # a torchvision whose compiled part does not fit this torch is made to import
    if library == "torchvision":
        from ondevice_trgl.model.zoo import build_model

        side = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56}.get(name, 64)
        return build_model(name, num_classes=CLASSES, in_shape=(3, side, side)), (3, side, side), 0
    if library == "timm":
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=CLASSES)
        shape = tuple(model.default_cfg.get("input_size", (3, 224, 224)))
        if not model.default_cfg.get("fixed_input_size"):
            shape = (3, 256, 256) if "halo" in name else (3, 96, 96)
        return model, shape, 0
    return _huggingface(name)


def _huggingface(name: str) -> tuple[nn.Module, tuple[int, ...], int]:
    import transformers as hf

    small: dict[str, dict[str, Any]] = {
        "vit": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
        | {"image_size": 64, "patch_size": 16},
        "resnet": {"embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "depths": [2, 2, 2, 2]},
        "convnext": {"hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2]},
        "mobilenet_v2": {},
        "swin": {"image_size": 64, "embed_dim": 24, "depths": [2, 2, 2], "num_heads": [2, 2, 4], "window_size": 4},
        "bert": {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128},
        "distilbert": {"dim": 64, "n_layers": 4, "n_heads": 4, "hidden_dim": 128},
    }
    config = hf.AutoConfig.for_model(name, num_labels=CLASSES, **small[name])
    if name in ("bert", "distilbert"):
        return hf.AutoModelForSequenceClassification.from_config(config), (24,), 1000
    return hf.AutoModelForImageClassification.from_config(config), (3, 64, 64), 0


def judged(library: str, name: str, *, budgets: bool, quick: bool) -> dict[str, Any]:
    """The row of one network; `failed` says what stopped it."""
    from ondevice_trgl import BudgetInfeasibleError, TrainConfig, Trainer, TrglError
    from ondevice_trgl.model.output import logits_of
    from ondevice_trgl.model.partition import partition

    row: dict[str, Any] = {"library": library, "name": name}
    model, shape, ids = made(library, name)
    row |= {"parameters": sum(p.numel() for p in model.parameters()), "input": list(shape)}
    data = Noise(shape, ids)
    started = time.perf_counter()
    try:
        parts = partition(model, data.inputs[:2])
        row |= {
            "segments": len(parts.modules),
            "branches": sum(len(module.branches) for module in parts.modules),
            "equal": True,
            "trace_and_proof_seconds": round(time.perf_counter() - started, 2),
        }
        if quick:
            return {**row, "passed": True}
        with tempfile.TemporaryDirectory(prefix="trgl-bench-") as folder:
            config = TrainConfig(
                budget="20GB", epochs=1, batch_size=BATCH, modules=min(2, len(parts.modules)), enforce=False
            )
            trainer = Trainer(model, config, run_dir=f"{folder}/run")
            report = trainer.fit(data, Noise(shape, ids, BATCH))
            exported = trainer.export(head="last").eval()
            val = Noise(shape, ids, BATCH)
            with torch.no_grad():
                guesses = logits_of(exported(val.inputs), name).argmax(1)
            row["reported"] = report.accuracy.last_head_val if report.accuracy else None
            row["exported"] = float((guesses == torch.arange(BATCH) % CLASSES).float().mean())
            if budgets:
                try:
                    tight = TrainConfig(budget="1MB", epochs=1, batch_size=16)
                    Trainer(made(library, name)[0], tight, run_dir=f"{folder}/tight").plan(data, val)
                except BudgetInfeasibleError as refusal:
                    row["smallest_budget_bytes"] = refusal.smallest_feasible_budget_bytes
    except TrglError as error:
        row["failed"] = error.message
    except Exception as error:  # what no error of ours says is a fault: the row has it as it is
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if "failed" not in row and abs(row["reported"] - row["exported"]) > 1e-6:
        row["failed"] = f"the report says {row['reported']}, the exported network has {row['exported']}"
    row["passed"] = "failed" not in row
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each library, and one for each network that does not pass."""
    lines = [
        "| library | networks | cut and equal | of those trained, exported, accuracy equal | segments (median) | "
        "with residual branches |",
        "|---" * 6 + "|",
    ]
    for library in LIBRARIES:
        own = [row for row in rows if row["library"] == library]
        if own:
            passed = [row for row in own if row["passed"]]
            cuts = sorted(row["segments"] for row in passed)
            branches = sum(row["branches"] > 0 for row in passed)
            middle = cuts[len(cuts) // 2] if cuts else 0
            share = len(passed) / len(own)
            trained = [row for row in passed if "exported" in row]
            counts = f"{len(own)} | {len(passed)} ({share:.1%}) | {len(trained)}"
            lines.append(f"| {library} | {counts} | {middle} | {branches} |")
    lines += ["", "| not passed | why |", "|---|---|"]
    for row in rows:
        if not row["passed"]:
            lines.append(f"| {row['library']} {row['name']} | {row['failed']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--of", default=",".join(LIBRARIES))
    parser.add_argument("--only", default="")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--budgets", action="store_true", help="find the smallest budget too, which takes longer")
    parser.add_argument("--quick", action="store_true", help="prove, and do not train")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("LIBRARY", "NAME"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(judged(*asked.one, budgets=asked.budgets, quick=asked.quick)))
        return
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    rows = {(row["library"], row["name"]): row for row in known}
    if not asked.table:
        only = set(filter(None, asked.only.split(",")))
        wanted = [(library, name) for library in asked.of.split(",") for name in named(library)]
        for key in wanted:
            if (only and key[1] not in only) or (key in rows and not asked.again and not only):
                continue
            rows[key] = _asked(key, [flag for flag in ("--budgets", "--quick") if getattr(asked, flag[2:])])
            print(json.dumps(rows[key]), file=sys.stderr)
            RESULTS.write_text(json.dumps(list(rows.values()), indent=1) + "\n", encoding="utf-8")
    print(table(list(rows.values())))


def _asked(key: tuple[str, str], flags: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", *key, *flags]
    failed = {"library": key[0], "name": key[1], "passed": False, "segments": 0, "branches": 0}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {**failed, "failed": f"took longer than {SECONDS} s"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines()[-1:] or [""]
        return {**failed, "failed": f"ended with status {done.returncode}: {said[0]}"}
    return found


if __name__ == "__main__":
    main()
