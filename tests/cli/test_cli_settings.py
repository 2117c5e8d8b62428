"""From flags, file and profile to a job."""

import dataclasses
from pathlib import Path

import pytest

from ondevice_trgl.cli.options import TRAINING
from ondevice_trgl.cli.settings import parse_modules, run_directory
from ondevice_trgl.config import DEFAULTS, Workload
from ondevice_trgl.job import Job
from tests.cli.conftest import Cli, Jobs

BUDGET = ("--budget", "600MB")


def test_every_flag_reaches_the_job(cli: Cli, jobs: Jobs, tmp_path: Path) -> None:
    flags = {
        "model": "resnet18", "data": "csv:t.csv", "image_size": 16, "orientation": "stored", "data_root": "d",
        "train_limit": 9,
        "weights": "w.pt", "init_gain": 0.1, "weights_skip": "fc, head.weight",
        "budget": "1GiB", "modules": "2", "schedule": "multi-lap", "laps": 2, "epochs": 3, "tau": "multiplier",
        "multiplier_start": 2.0, "multiplier_rate": 0.5, "multiplier_every": 7, "tau_depth": "constant",
        "classifier_epochs": 7, "freeze_until": "layer3", "freeze_norms": True, "train": "norm",
        "warm_heads": 2, "epochs_rule": "deeper", "patience": 3, "stop_when": "never",
        "transport": "displacement", "head": "mlp", "optimizer": "adamw", "lr": 0.5, "lr_schedule": "step",
        "lr_steps": "0.25,0.5", "lr_gamma": 0.2, "warmup": 0.1, "clip_norm": 1.5, "loss": "cross-entropy",
        "class_weights": "1, 2.5", "precision": "auto", "task": "classes", "metric": "pkg.mod:own",
        "batch_size": 24,
        "micro_batch": "8", "cache": "disk", "cache_dir": "c", "cache_limit": "1GB", "cache_dtype": "bf16",
        "shuffle": "exact", "checkpoint_every": "5min", "nice": 50.0, "max_celsius": 70.0, "min_battery": 20.0,
        "max_load": 40.0, "wait_while": "pkg.mod:busy",
        "device": "cuda:1", "threads": 3, "seed": 7, "balance": True, "augment": "crop, pkg.mod:own", "views": 3,
    }  # fmt: skip
    assert set(flags) == {name for name in TRAINING if name in DEFAULTS}, "a flag is not tried here"
    argv: list[str] = []
    for name, value in flags.items():
        argv += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    result = cli("train", *argv, "-o", "somewhere", "--force", "--baseline", "skip", "--allocator", "glibc")
    assert result.code == 0
    (job,) = jobs.jobs
    settings = job.workload.to_dict() | job.config.to_dict()
    expected = flags | {
        "modules": 2,
        "micro_batch": 8,
        "lr_steps": [0.25, 0.5],
        "class_weights": [1.0, 2.5],
        "weights_skip": ["fc", "head.weight"],
        "augment": ["crop", "pkg.mod:own"],
    }
    assert {name: settings[name] for name in flags} == expected
    assert (job.run_dir, job.force, job.baseline, job.allocator) == (Path("somewhere"), True, "skip", "glibc")
    assert job.command.startswith("trgl-device train --model resnet18 --data csv:t.csv ")


def test_without_flags_the_defaults_hold(cli: Cli, jobs: Jobs) -> None:
    assert cli("train", *BUDGET).code == 0
    (job,) = jobs.jobs
    settings = job.workload.to_dict() | job.config.to_dict()
    assert settings == DEFAULTS | {"budget": "600MB"}
    assert (job.run_dir, job.force) == (Path("runs/resnet-small-digits"), False)
    assert (job.baseline, job.allocator) == ("auto", "auto")


def test_flag_over_file_over_profile_over_default(cli: Cli, jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("epochs = 9\nlr = 0.5\nthreads = 2\n", encoding="utf-8")
    result = cli("train", "--dry-run", "-p", "raspberry-pi-4-2gb", "-c", "mine.toml", "--epochs", "3", "-v")
    (job,) = jobs.jobs
    config = job.config
    assert (config.epochs, config.lr, config.threads, config.batch_size) == (3, 0.5, 2, 32)
    settings = result.out.partition("\n\n")[0]
    origins = {words[0]: words[-1] for line in settings.splitlines() if (words := line.split())}
    assert {name: origins[name] for name in ("epochs", "lr", "threads", "budget", "momentum")} == {
        "epochs": "flag",
        "lr": "mine.toml",
        "threads": "mine.toml",
        "budget": "profile",
        "momentum": "default",
    }


def test_where_settings_came_from_never_spoils_the_json(cli: Cli, jobs: Jobs) -> None:
    for command in ("plan", "train"):
        result = cli(command, *BUDGET, "--json", "-v")
        assert result.json["budget_bytes"] == 600_000_000
        assert "600MB" in result.err
        assert "flag" in result.err


def test_a_profile_by_file(cli: Cli, jobs: Jobs, tmp_path: Path) -> None:
    result = cli("train", "-p", "board.toml")
    assert result.code == 2
    assert "board.toml" in result.err
    values = {"title": '"b"', "device": '"cpu"', "sources": '["b"]', "threads": "2", "reserve": '"1MB"'}
    values |= dict.fromkeys(("ram", "disk_quota", "disk_read_per_second", "disk_write_per_second"), '"1GiB"')
    values["flash_endurance"] = '"9GB"'
    (tmp_path / "board.toml").write_text("\n".join(f"{key} = {value}" for key, value in values.items()))
    assert cli("train", "-p", "board.toml").code == 0
    assert jobs.jobs[-1].flash_endurance_bytes == 9 * 10**9
    assert Job.from_dict(jobs.jobs[-1].to_dict()).flash_endurance_bytes == 9 * 10**9


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("auto", "auto"),
        ("4", 4),
        ("layer1,layer2.0", ("layer1", "layer2.0")),
        ("a, b", ("a", "b")),
        ("layer1", ("layer1",)),
    ],
)
def test_modules(text: str, value: object) -> None:
    assert parse_modules(text) == value


@pytest.mark.parametrize("text", ["0", "-1", "a,,b", ""])
def test_modules_that_make_no_sense(cli: Cli, jobs: Jobs, text: str) -> None:
    result = cli("train", *BUDGET, f"--modules={text}")
    assert result.code == 2
    assert "modules = " in result.err
    assert jobs.calls == []


def test_a_loss_by_name_and_balanced_classes(cli: Cli, jobs: Jobs) -> None:
    cli("train", *BUDGET, "--loss", "my.losses:focal")
    cli("train", *BUDGET, "--class-weights", "balanced")
    assert (jobs.jobs[0].config.loss, jobs.jobs[1].config.class_weights) == ("my.losses:focal", "balanced")
    assert cli("train", *BUDGET, "--loss", "focal").code == 2


def test_tau_off_and_by_depth(cli: Cli, jobs: Jobs) -> None:
    cli("train", *BUDGET, "--tau", "off")
    cli("train", *BUDGET, "--tau", "0.25", "--tau-depth", "half-first")
    assert not jobs.jobs[0].config.has_transport
    assert [jobs.jobs[1].config.tau_of(index, 3) for index in range(3)] == [0.125, 0.25, 0.25]


def test_no_budget_names_this_machine(cli: Cli, jobs: Jobs) -> None:
    result = cli("train")
    assert result.code == 2
    assert "no memory budget" in result.err
    assert " of RAM" in result.err
    suggested = result.err.split("--budget ")[1].split(",")[0]
    assert cli("train", "--budget", suggested).code == 0


def test_every_fault_at_once(cli: Cli, jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('epochs = 0\nhead = "con"\nlearning_rate = 1\n', encoding="utf-8")
    result = cli("train", "-c", "bad.toml", "--schedule", "sequental", "--tau", "x")
    assert result.code == 2
    for part in ("5 faults", "epochs = 0", "'conv'", "learning_rate", "'sequential'", "tau = 'x'"):
        assert part in result.err
    assert jobs.calls == []


def test_a_config_file_that_is_not_there(cli: Cli, jobs: Jobs) -> None:
    result = cli("train", "-c", "absent.toml")
    assert result.code == 2
    assert "absent.toml" in result.err


@pytest.mark.parametrize(
    ("workload", "name"),
    [
        (Workload(), "resnet-small-digits"),
        (Workload(model="resnet18", data="synthetic:3x8x8:4:32"), "resnet18-synthetic-3x8x8-4-32"),
        (Workload(model="resnet18", data="csv:some/where/labels.csv"), "resnet18-csv-labels.csv"),
        (Workload(data="folder:/some/where/cats & dogs"), "resnet-small-folder-cats-dogs"),
        (Workload(model="my.pkg:net", data="../x"), "my.pkg-net-..-x"),
    ],
)
def test_a_run_directory_is_named_after_the_work(workload: Workload, name: str) -> None:
    path = run_directory({"run_dir": None}, workload)
    assert path == Path("runs") / name


def test_a_taken_run_directory_gets_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        path = run_directory({}, dataclasses.replace(Workload()))
        path.mkdir(parents=True)
        names.append(path.name)
    assert names == ["resnet-small-digits", "resnet-small-digits-2", "resnet-small-digits-3"]
    assert run_directory({"run_dir": "runs/resnet-small-digits"}, Workload()).name == "resnet-small-digits"
