"""Damaged and hostile files: opening them works or raises a TrglError, soon and in bounded memory.

A small run is trained and paused in its second module; its files, and files of settings and data, are changed again and
again: bytes flipped, cut off, copied elsewhere; JSON with other types, huge numbers, deep nesting, keys that are gone
or twice. Each is then opened by the functions that read its kind, in this process, against a clock and the kernel's
figure for its memory. Seeded: what failed is printed with the command that does it again.

    python benchmarks/fuzz.py [--files 10000] [--kind plan.json ...] [--seed 0] [--only NUMBER]
"""

import argparse
import copy
import faulthandler
import gzip
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ondevice_trgl import jobs
from ondevice_trgl.cache.disk import DiskCache
from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.data.idx import idx_part
from ondevice_trgl.data.listing import pictures_in
from ondevice_trgl.data.table import pictures_listed
from ondevice_trgl.device.meter import own_peak_rss
from ondevice_trgl.device.profile import load_profile
from ondevice_trgl.device.randomness import Randomness
from ondevice_trgl.errors import DamagedFileError, TrglError
from ondevice_trgl.job import Job
from ondevice_trgl.model.partition import group
from ondevice_trgl.model.weights import read_weights
from ondevice_trgl.model.zoo import build_model
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.processes import Ask, ask
from ondevice_trgl.report.html import to_html
from ondevice_trgl.report.model import read_report
from ondevice_trgl.report.text import report_lines
from ondevice_trgl.resolved import read_toml, resolve
from ondevice_trgl.run.callbacks import Callback, RunState
from ondevice_trgl.run.inventory import look_at
from ondevice_trgl.run.opening import fresh_head, network_of, open_run, sources
from ondevice_trgl.run.position import Position
from ondevice_trgl.run.record import RunRecord
from ondevice_trgl.run.run_dir import BLUEPRINT, NAMES, PARTITION, PLAN, RECORD, REPORT, RunDir
from ondevice_trgl.run.trained import TrainedRun
from ondevice_trgl.trgl.optim import Optimizer
from ondevice_trgl.workload import load_bundle

RESULTS = Path(__file__).resolve().parent / "results" / "fuzz.json"
SECONDS, GROWTH_BYTES = 10, 96 << 20
"""That opening one file may take; the libraries that are loaded by then are not part of it."""
ROOM_BYTES = 1 << 30
"""Of address space, for what is asked for and never touched."""
CPU = torch.device("cpu")
RAW = "RAW-8d1f:"
"""How text begins that stands in a JSON file as it is, without quotes."""
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, 2**31, 2**53, 2**62, 2**63, 2**64, -(2**63)),
    *("", "x", "x" * 5000, "a.b.c", "../../x", "/", "\0", "\ud800", "\udcff", "nan", "cuda:9", "1" * 40 + "!"),
    *([], {}, [[]], [None], {"": None}, [0] * 1000, {"a": {"b": {"c": {}}}}, [2**62, 2**62], [-1, -1]),
    *(RAW + text for text in ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 5000, '{"a":' * 500)),
    *(RAW + text for text in ('{"a":1,"a":2}', "[" * 99 + "]" * 99, "[" * 5000 + "]" * 5000, "01", "tru", "-", '"')),
]
HOSTILE_TOML = [
    *("0x" + "f" * 6000, "9" * 6000, "[" * 3000, "[" * 30 + "]" * 30, "nan", "-inf", "1979-05-27", "{}", "[]", "'a'"),
    *("{a.b.c.d.e.f.g.h.i.j = 1}", "true", "-1", "''", '"\\u0000"', "1e400", "[1, 'a', {}]", '"' + "x" * 5000 + '"'),
]


class Hung(Exception):  # noqa: N818 -- no TrglError, whatever catches those
    """The clock ran out."""


@dataclass(frozen=True)
class Kind:
    """A kind of file: `place` holds a good one, `change` makes another of its bytes, `read` opens what stands there."""

    place: Path
    change: Callable[[random.Random, bytes], bytes]
    read: Callable[[], object]


def bytes_changed(draw: random.Random, data: bytes) -> bytes:
    """`data` as a failing disk, or a careless hand, leaves it."""
    at, to = sorted((draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)))
    part = data[at : min(to, at + 64)]
    match draw.randrange(8):
        case 0:
            changed = bytearray(data)
            for _ in range(draw.choice((1, 1, 2, 8, 64))):
                changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
            return bytes(changed)
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[to:]
        case 3:
            return data[:at] + part * draw.choice((2, 3, 100)) + data[at:]
        case 4:
            return data[:at] + bytes(len(part)) + data[at + len(part) :]
        case 5:
            return data[:at] + draw.randbytes(draw.choice((1, 4, 16))) + data[at:]
        case 6:
            return data[:at] + draw.choice((b"\xff", b"\xff\xfe", b"\0", b"[" * 3000, b"9" * 5000)) + data[at:]
        case _:
            other = draw.randrange(len(data) + 1)
            return data[:other] + part + data[other + len(part) :]


def places_in(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys, itself in a list of one included."""
    waiting = [[tree]]
    while waiting:
        one = waiting.pop()
        for key, value in one.items() if isinstance(one, dict) else enumerate(one):
            yield one, key
            if isinstance(value, dict | list):
                waiting.append(value)


def tree_changed(draw: random.Random, tree: Any) -> Any:
    """A JSON value with one or a few places that are otherwise. `tree` itself is changed."""
    root = [tree]
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        places = list(places_in(root[0]))[1:] or [(root, 0)]
        holder, key = draw.choice(places)
        other, from_ = draw.choice(places)
        value = holder[key]
        match draw.randrange(8):
            case 0:
                del holder[key]
            case 1:
                holder[key] = json.loads(json.dumps(other[from_]))  # of a type that is known, in another place
            case 2 if isinstance(value, int | float) and not isinstance(value, bool):
                holder[key] = draw.choice((-value, value + 1, value - 1, value * 2**20, value / 3, 0))
            case 3 if isinstance(holder, dict):
                holder[f"{key}{draw.choice(('', 'x', '_', '.'))}more"] = value
            case 3:
                holder.insert(key, json.loads(json.dumps(value)))
            case 4 if isinstance(value, dict):
                name = draw.choice([*value, "a"])
                body = json.dumps(value)[1:-1]
                holder[key] = f"{RAW}{{{body}{', ' if body else ''}{json.dumps(name)}: 1}}"
            case 5 if isinstance(value, list):
                draw.shuffle(value)
            case _:
                holder[key] = copy.deepcopy(draw.choice(HOSTILE))
        if not root:
            return copy.deepcopy(draw.choice(HOSTILE))
    return root[0]


def written(tree: Any) -> bytes:
    """JSON with what is raw in it."""
    text, out = json.dumps(tree), []
    mark = '"' + RAW
    while mark in text:
        before, _, text = text.partition(mark)
        quoted, text = raw_end(text)
        out += [before, json.loads(f'"{quoted}"')]
    return "".join([*out, text]).encode()


def raw_end(text: str) -> tuple[str, str]:
    """What is in quotes up to the first that is not escaped, and the rest."""
    at = 0
    while text[at] != '"':
        at += 2 if text[at] == "\\" else 1
    return text[:at], text[at + 1 :]


def json_changed(draw: random.Random, data: bytes) -> bytes:
    """A JSON file, mostly one still."""
    return written(tree_changed(draw, json.loads(data))) if draw.random() < 0.75 else bytes_changed(draw, data)


def tensors_changed(draw: random.Random, data: bytes) -> bytes:
    """A safetensors file, mostly with a header that can be read."""
    if draw.random() < 0.25:
        return bytes_changed(draw, data)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    told = header.get("__metadata__", {})
    if "position" in told and draw.random() < 0.5:
        told["position"] = json_changed(draw, told["position"].encode()).decode("utf-8", "replace")
        text = json.dumps(header).encode()
    else:
        text = written(tree_changed(draw, header))
    stated = len(text) if draw.random() < 0.9 else draw.choice((0, 1, len(text) + 1, 2**31, 2**63, 2**64 - 1))
    return stated.to_bytes(8, "little") + text + data[8 + length :]


def toml_changed(draw: random.Random, data: bytes) -> bytes:
    """A TOML file, mostly one still."""
    if draw.random() < 0.4:
        return bytes_changed(draw, data)
    lines = data.decode().splitlines()
    at = draw.randrange(len(lines))
    key = lines[at].partition("=")[0]
    match draw.randrange(4):
        case 0:
            lines[at] = f"{key}.{'.'.join('a' * draw.choice((1, 9, 3000)))} = 1"
        case 1:
            lines.insert(at, draw.choice((lines[at], "[a]", "[[a]]", '"" = 1', "[" * 3000)))
        case _:
            lines[at] = f"{key}= {draw.choice(HOSTILE_TOML)}"
    return "\n".join(lines).encode()


def table_changed(draw: random.Random, data: bytes) -> bytes:
    """A CSV file with lines and fields that are otherwise."""
    if draw.random() < 0.4:
        return bytes_changed(draw, data)
    lines = data.decode().splitlines()
    at = draw.randrange(len(lines))
    fields = lines[at].split(",")
    fields[draw.randrange(len(fields))] = draw.choice(
        (
            "",
            '"',
            '"x',
            "\0",
            "x" * 200_000,
            "../" * 2000,
            "/dev/zero",
            ".",
            "-1",
            "nan",
            "\udcff",
            "1e999",
            ",,,,;;;\t",
        )
    )
    lines[at] = ",".join(fields)
    return "\n".join(lines * draw.choice((1, 1, 2))).encode("utf-8", "surrogateescape")


def zipped_changed(draw: random.Random, data: bytes) -> bytes:
    """A gzip file: what is in it otherwise, or the file itself."""
    if draw.random() < 0.3:
        return bytes_changed(draw, data)
    return gzip.compress(idx_changed(draw, gzip.decompress(data)), 1)


def idx_changed(draw: random.Random, data: bytes) -> bytes:
    """An idx file, often with other sizes in its header."""
    if draw.random() < 0.5:
        return bytes_changed(draw, data)
    at = draw.choice((4, 8, 12))
    size = draw.choice((0, 1, 2**16, 2**31, 2**32 - 1, draw.randrange(2**32)))
    return data[:at] + size.to_bytes(4, "big") + data[at + 4 :] + bytes(draw.choice((0, 0, 1, 1 << 20)))


class PauseInSecond(Callback):
    """Pauses in the middle of the second module."""

    def on_step_end(self, run: RunState) -> None:
        if run.module == 1 and run.step == 2:
            run.request_pause()


def kinds(folder: Path, ask: Ask = ask) -> dict[str, Kind]:
    """Every kind of file, by name, with a good one in `folder`."""
    work = Workload(model="resnet-small", data="digits", image_size=12, train_limit=100)
    config = TrainConfig(budget="64GB", modules=3, epochs=1, threads=1, batch_size=16, optimizer="adamw")
    jobs.train_job(Job(work, config, folder / "run", baseline="skip"), [PauseInSecond()], ask=ask)
    run = folder / "run"
    bundle = load_bundle(work, 0, folder)
    data = sources(bundle.train, bundle.val, bundle.test)
    opened = open_run(run, data)
    cache = next((run / "cache").glob("*train*.json")).with_suffix(".bin")
    cache = next(path for path in (run / "cache").iterdir() if path.stem == cache.stem and path.suffix != ".json")
    seal = json.loads(cache.with_suffix(".json").read_text(encoding="utf-8"))
    model = build_model("resnet-small", num_classes=10, in_shape=(1, 12, 12))

    def settings() -> None:
        record = RunDir.open(run).load(RECORD, RunRecord.from_dict)
        look_at(run)
        record.metadata  # noqa: B018
        if record.workload is not None:
            record.named(run)
        record.reported, record.config.budget_bytes, record.config.view_count  # noqa: B018

    def plan() -> None:
        found = RunDir.open(run).load(PLAN, Plan.from_dict)
        found.summary()
        for index in range(found.num_parts):
            found.epochs(opened.config, index)
        found.predicted_breakdowns, found.peak_bytes, found.grad_accum_steps  # noqa: B018
        TrainedRun.open(run).head("best")

    def report() -> None:
        found = read_report(run)
        report_lines(found)
        to_html(found)
        json.dumps(found.to_dict())
        look_at(run)
        TrainedRun.open(run).head("best")

    def whole() -> None:
        found = open_run(run, data)
        assert len(found.heads) == found.plan.num_parts

    def judged() -> None:
        trained = TrainedRun.open(run)
        chain = network_of(trained.run, lambda: model, data["train"], folder, opened.config)
        partition = group(chain, trained.plan.bounds)
        for index in range(trained.plan.num_parts):
            fresh_head(chain, partition, opened.config, index)

    def module() -> None:
        part, head = opened.partition.modules[1], opened.heads[1]
        Position.of(opened.store, 1)
        opened.store.load(1, part, head, CPU)
        parameters = dict(part.named_parameters()) | {f"head.{n}": p for n, p in (head or part).named_parameters()}
        optimizer = Optimizer("adamw", parameters)
        for name, tensor in opened.store.load_extra(1, "optim", CPU).items():
            optimizer.takes(name, tensor)
        Randomness.of(opened.store.load_extra(1, "run", CPU)).restore(CPU)
        TrainedRun.open(run).head("best")

    def boundary() -> None:
        labels = data["train"].labels
        rows = labels.repeat(-(-seal["rows"] // len(labels)))[: seal["rows"]]
        shape = tuple(seal["shape"])
        found = DiskCache.sealed(cache, seal["producer"], shape, seal["dtype"], rows)
        if found is None:  # which whoever takes it up makes again
            raise DamagedFileError("no seal of this boundary")
        damaged = {row for part in found.damaged() for row in part}
        if good := [row for row in range(found.rows) if row not in damaged][:8]:
            found.read(good, torch.empty(len(good), *shape))
        found.close(keep=True)
        if damaged:
            raise DamagedFileError(f"{len(damaged)} rows are to be made again")

    def listing() -> None:
        pictures_in(folder / "pictures")
        pictures_listed(folder / "table.csv")

    others = made_beside(folder)
    places = {name: run / name for name in (RECORD, PLAN, PARTITION, BLUEPRINT, NAMES, REPORT)}
    reads = dict.fromkeys(places, whole) | {RECORD: settings, PLAN: plan, REPORT: report}
    found = {name: Kind(place, json_changed, reads[name]) for name, place in places.items()}
    found[f"{RECORD}, resumed"] = Kind(run / RECORD, json_changed, whole)
    found[f"{PLAN}, resumed"] = Kind(run / PLAN, json_changed, whole)
    found[f"{BLUEPRINT}, evaluated"] = Kind(run / BLUEPRINT, json_changed, judged)
    found["module"] = Kind(run / "modules" / "001.safetensors", tensors_changed, module)
    found["seal"] = Kind(cache.with_suffix(".json"), json_changed, boundary)
    found["boundary"] = Kind(cache, bytes_changed, boundary)
    toml, profile, table, images, labels, weights = others
    found["config.toml"] = Kind(toml, toml_changed, lambda: resolve({}, file=read_toml(toml)))
    found["profile.toml"] = Kind(profile, toml_changed, lambda: load_profile(profile).to_dict())
    found["table.csv"] = Kind(table, table_changed, listing)
    found["idx images"] = Kind(
        images, zipped_changed, lambda: sum(map(len, idx_part(images, labels, (28, 28)).stream()))
    )
    found["idx labels"] = Kind(labels, idx_changed, lambda: idx_part(images, labels, (28, 28)))
    found["weights"] = Kind(weights, tensors_changed, lambda: read_weights(weights, model, classes=10))
    return found


def made_beside(folder: Path) -> tuple[Path, ...]:
    """Files of settings, data and weights: a config, a profile, a table of pictures, idx images and labels, weights."""
    toml, profile, table = (folder / name for name in ("train.toml", "board.toml", "table.csv"))
    toml.write_text('model = "resnet-small"\nbudget = "600MB"\nepochs = 3\ntau = 10.0\naugment = ["crop"]\n', "utf-8")
    shipped = Path(__file__).resolve().parents[1] / "profiles"
    shutil.copy(min(shipped.glob("*.toml")), profile)
    rows = ["path,label,split"]
    for label in ("a", "b"):
        for split in ("train", "val"):
            place = folder / "pictures" / split / label
            place.mkdir(parents=True)
            for number in range(3):
                (place / f"{number}.png").write_bytes(b"no picture, and not looked at")
                rows.append(f"{(place / f'{number}.png').relative_to(folder)},{label},{split}")
    table.write_text("\n".join(rows), encoding="utf-8")
    images, labels, weights = (folder / name for name in ("images.gz", "labels", "weights.safetensors"))
    count = (50).to_bytes(4, "big")
    size = (28).to_bytes(4, "big")
    images.write_bytes(gzip.compress(bytes((0, 0, 8, 3)) + count + 2 * size + random.Random(0).randbytes(50 * 784)))
    labels.write_bytes(bytes((0, 0, 8, 1)) + count + bytes(k % 10 for k in range(50)))
    shutil.copy(folder / "run" / "weights.safetensors", weights)
    return toml, profile, table, images, labels, weights


def growth_of(read: Callable[[], object]) -> tuple[str, int]:
    """What came of `read`, and the bytes by which the process grew meanwhile."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest so far is as now
    before = own_peak_rss()
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True)  # for C code, which no clock of Python's interrupts
    said = outcome_of(read)
    faulthandler.cancel_dump_traceback_later()
    return said, own_peak_rss() - before


def outcome_of(read: Callable[[], object]) -> str:
    """What came of `read`: "opened", "refused", or the traceback of whatever else it was."""
    said = "opened"
    signal.alarm(SECONDS)
    try:
        read()
    except TrglError as error:
        said = "refused"
        str(error).encode("utf-8", "backslashreplace")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        said = "".join(traceback.format_exception(error))
    finally:
        signal.alarm(0)
    return said


def fuzzed(name: str, kind: Kind, numbers: range, seed: int) -> dict[str, Any]:
    """Counts of what came of the files of one kind, and which of them failed and how."""
    good = kind.place.read_bytes()
    counts: dict[str, Any] = {"files": len(numbers), "opened": 0, "refused": 0, "failed": [], "most_growth_bytes": 0}
    began = time.perf_counter()
    for number in numbers:
        draw = random.Random(f"{name} {seed} {number}")
        kind.place.write_bytes(kind.change(draw, good))
        said, growth = growth_of(kind.read)
        counts["most_growth_bytes"] = max(counts["most_growth_bytes"], growth)
        if said in ("opened", "refused"):
            counts[said] += 1
        if growth > GROWTH_BYTES:
            said = f"it took {growth >> 20} MiB\n"
        if said not in ("opened", "refused"):
            counts["failed"].append(number)
            print(f"{said}--kind '{name}' --seed {seed} --only {number}\n", file=sys.stderr, flush=True)
    kind.place.write_bytes(good)
    counts["seconds"] = round(time.perf_counter() - began, 1)
    return counts


def ring(*_: Any) -> None:
    """What the clock does."""
    raise Hung(f"not done after {SECONDS} s")


def bound_room() -> None:
    """From now on this process gets so much for what it asks for, touched or not."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    size = pages * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="of each kind")
    parser.add_argument("--kind", action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    asked = parser.parse_args()
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="trgl-fuzz-") as place:
        found = kinds(Path(place))
        for kind in found.values():
            kind.read()  # good files are good, and what they load is loaded
        signal.signal(signal.SIGALRM, ring)
        bound_room()
        numbers = range(asked.files) if asked.only is None else range(asked.only, asked.only + 1)
        for name in asked.kind or found:
            record[name] = {**fuzzed(name, found[name], numbers, asked.seed), "seed": asked.seed}
            print(name, json.dumps(record[name]), file=sys.stderr, flush=True)
    if asked.only is None:
        known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        RESULTS.write_text(json.dumps(known | record, indent=1) + "\n", encoding="utf-8")
    if failed := {name: len(counts["failed"]) for name, counts in record.items() if counts["failed"]}:
        raise SystemExit(f"neither opened nor refused: {failed}")


if __name__ == "__main__":
    main()
