"""Workload and TrainConfig: defaults, checks, files, and which source wins."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondevice_trgl.config import IN_FILES, LR_SCHEDULES, TrainConfig, Workload
from ondevice_trgl.data.pictures import pictures_named
from ondevice_trgl.errors import ConfigError, DataError
from ondevice_trgl.resolved import read_toml, resolve


def test_defaults_are_valid_and_json_ready() -> None:
    record = json.loads(json.dumps({**TrainConfig().to_dict(), **Workload().to_dict()}))
    assert record["model"] == "resnet-small"
    assert record["budget"] is None
    assert TrainConfig().budget_bytes is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budget", "many"),
        ("budget", "-1GB"),
        ("modules", 0),
        ("modules", ()),
        ("modules", ("a", "")),
        ("modules", "some"),
        ("schedule", "random"),
        ("laps", 0),
        ("epochs", True),
        ("epochs", 1.5),
        ("tau", 0.0),
        ("tau", -1),
        ("tau", math.nan),
        ("tau", "on"),
        ("tau_depth", "last-first"),
        ("multiplier_start", 0.0),
        ("multiplier_rate", -1),
        ("multiplier_every", 0),
        ("transport", "car"),
        ("transport_norm", "max"),
        ("head", "none"),
        ("optimizer", "lion"),
        ("lr", 0.0),
        ("lr", math.inf),
        ("lr_schedule", "linear"),
        ("lr_steps", (0.5, 0.5)),
        ("lr_steps", (0.5, 1.0)),
        ("lr_steps", ("half",)),
        ("lr_steps", ()),
        ("lr_steps", 0.5),
        ("lr_gamma", 0.0),
        ("lr_gamma", 2),
        ("clip_norm", 0),
        ("precision", "fp16"),
        ("loss", "focal"),
        ("loss", ":f"),
        ("loss", "pkg:"),
        ("loss", 3),
        ("class_weights", "even"),
        ("class_weights", (1.0,)),
        ("class_weights", (1.0, -1.0)),
        ("class_weights", (0, 0)),
        ("class_weights", (1.0, math.inf)),
        ("class_weights", ("a", "b")),
        ("clip_norm", math.inf),
        ("warmup", 1.0),
        ("warmup", -0.1),
        ("momentum", 1.01),
        ("weight_decay", -0.1),
        ("label_smoothing", 2),
        ("balance", 1),
        ("batch_size", 0),
        ("micro_batch", 0),
        ("micro_batch", "all"),
        ("cache", "tape"),
        ("cache_dir", 3),
        ("checkpoint_every", "60"),
        ("checkpoint_every", 60),
        ("cache_limit", "0"),
        ("cache_dtype", "fp8"),
        ("shuffle", "chunk"),
        ("device", "gpu"),
        ("device", "cuda:x"),
        ("threads", 0),
        ("seed", -1),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{name: value})
    assert len(caught.value.faults) == 1
    assert caught.value.faults[0].startswith(f"{name} = ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", 0),
        ("train_limit", 0),
        ("model", ""),
        ("data", 5),
        ("data_root", 1),
        ("weights", 1),
        ("weights_skip", "fc"),
        ("weights_skip", ("fc",)),
        ("orientation", "upright"),
        ("orientation", None),
    ],
)
def test_a_bad_workload_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        Workload(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budget", "600MB"),
        ("budget", 600_000_000),
        ("modules", 4),
        ("modules", ("stem", "layer1")),
        ("tau", "off"),
        ("tau", 0.1),
        ("lr", 0.01),
        ("micro_batch", 8),
        ("device", "cuda:1"),
        ("cache_dir", Path("somewhere")),
        ("threads", 2),
    ],
)
def test_good_values_survive_the_way_through_json(name: str, value: Any) -> None:
    config = TrainConfig(**{name: value})
    assert TrainConfig(**json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()


def test_all_faults_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(schedule="sequental", epochs=0, optimizer="sdg")
    assert len(caught.value.faults) == 3
    assert "did you mean 'sequential'?" in str(caught.value)


def test_laps_need_the_multi_lap_schedule() -> None:
    with pytest.raises(ConfigError, match="laps = 2"):
        TrainConfig(laps=2)
    assert TrainConfig(laps=2, schedule="multi-lap").laps == 2


def test_what_is_of_cross_entropy_is_refused_with_another_loss() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(loss="pkg.losses:focal", label_smoothing=0.0, class_weights=(1, 2))
    assert caught.value.faults == (
        "label_smoothing = 0.0: loss = pkg.losses:focal has none, cross-entropy has",
        "class_weights = [1, 2]: loss = pkg.losses:focal has none, cross-entropy has",
    )


def test_classes_are_not_balanced_within_chunks() -> None:
    with pytest.raises(ConfigError, match="shuffle = 'chunks': balance draws classes in turns"):
        TrainConfig(balance=True, shuffle="chunks")


def test_classes_are_not_balanced_twice() -> None:
    with pytest.raises(ConfigError, match="balance draws classes equally often already; leave one out"):
        TrainConfig(class_weights="balanced", balance=True)
    assert TrainConfig(class_weights=(1, 2), balance=True).class_weights == (1, 2)


def test_step_falls_at_shares_of_the_steps() -> None:
    published = TrainConfig(lr=1.0, lr_schedule="step")
    assert [published.learning_rate_at(done) for done in (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)] == pytest.approx(
        [1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    )
    own = TrainConfig(lr=1.0, lr_schedule="step", lr_steps=(0.2,), lr_gamma=0.5)
    assert [own.learning_rate_at(done) for done in (0.1, 0.2, 0.9)] == [1.0, 0.5, 0.5]
    assert TrainConfig(**json.loads(json.dumps(own.to_dict()))) == own


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_warm_up_rises_in_a_line_and_the_schedule_goes_on_from_there(schedule: str) -> None:
    config = TrainConfig(lr=2.0, lr_schedule=schedule, warmup=0.25)
    rates = [config.learning_rate_at(done) for done in (0.0, 0.125, 0.25)]
    assert rates == pytest.approx([0.02, 1.01, 2.0])
    steep = [config.learning_rate_at(done) for done in (0.3, 0.6, 0.9)]
    assert steep == sorted(steep, reverse=True)
    if schedule == "cosine":
        assert config.learning_rate_at(0.625) == pytest.approx(1.0)  # half way behind the warm-up
        assert config.learning_rate_at(1.0) == pytest.approx(0.0)
    plain = TrainConfig(lr=2.0, lr_schedule=schedule)
    assert plain.learning_rate_at(0.0) == 2.0


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_steps_of_a_schedule_that_has_none_are_refused(schedule: str) -> None:
    with pytest.raises(ConfigError, match=f"lr_schedule = '{schedule}' has none; set 'step'") as caught:
        TrainConfig(lr_schedule=schedule, lr_steps=(0.5,), lr_gamma=0.1)
    assert [fault.split(" = ")[0] for fault in caught.value.faults] == ["lr_steps", "lr_gamma"]


@pytest.mark.parametrize("modules", range(1, 6))
def test_half_first_halves_tau_for_the_first_half_of_any_number_of_modules(modules: int) -> None:
    config = TrainConfig(tau=0.5, tau_depth="half-first")
    taus = [config.tau_of(index, modules) for index in range(modules + 1)]  # one more: the network's own classifier
    assert taus == [0.25] * (modules // 2) + [0.5] * (modules + 1 - modules // 2)
    assert TrainConfig(tau=0.5).tau_of(0, modules) == 0.5
    assert TrainConfig(tau="off").tau_of(0, modules) is None


@pytest.mark.parametrize("tau", ["off", "multiplier"])
def test_what_has_no_half_is_not_halved(tau: str) -> None:
    with pytest.raises(ConfigError, match=f"tau_depth = 'half-first': tau = '{tau}' has no half; give tau a number"):
        TrainConfig(tau=tau, tau_depth="half-first")


@pytest.mark.parametrize("tau", ["off", 0.1])
def test_settings_of_a_multiplier_that_is_not_there_are_refused(tau: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(tau=tau, multiplier_start=2.0, multiplier_rate=0.5, multiplier_every=10)
    assert [fault.split(" = ")[0] for fault in caught.value.faults] == [
        "multiplier_start",
        "multiplier_rate",
        "multiplier_every",
    ]
    assert all("set tau = 'multiplier'" in fault for fault in caught.value.faults)
    assert TrainConfig(tau="multiplier", multiplier_every=10).has_transport


def test_micro_batch_must_divide_the_batch() -> None:
    with pytest.raises(ConfigError, match="micro_batch = 5: must divide batch_size = 32"):
        TrainConfig(micro_batch=5)


def test_derived_values() -> None:
    assert TrainConfig(budget="2GiB").budget_bytes == 2 << 30
    assert TrainConfig(tau="off").tau_value is None
    assert TrainConfig(tau=1).tau_value == 1.0
    assert TrainConfig().learning_rate == 0.05
    assert TrainConfig(optimizer="adamw").learning_rate == 0.001
    assert TrainConfig(lr=0.3).learning_rate == 0.3


@given(batch=st.integers(1, 512), micro=st.integers(1, 512))
def test_accepted_micro_batches_divide_the_batch(batch: int, micro: int) -> None:
    if batch % micro == 0:
        assert TrainConfig(batch_size=batch, micro_batch=micro).batch_size % micro == 0
    else:
        with pytest.raises(ConfigError):
            TrainConfig(batch_size=batch, micro_batch=micro)


def test_flag_beats_file_beats_profile_beats_default() -> None:
    resolved = resolve(
        {"epochs": 1, "budget": None, "lr": None},
        file={"epochs": 2, "batch-size": 8},
        file_name="run.toml",
        profile={"epochs": 3, "batch_size": 16, "budget": "1GB"},
    )
    assert (resolved.config.epochs, resolved.config.batch_size, resolved.config.budget) == (1, 8, "1GB")
    origins = [resolved.origins[name] for name in ("epochs", "batch_size", "budget", "lr")]
    assert origins == ["flag", "run.toml", "profile", "default"]


def test_resolve_tells_workload_and_config_apart() -> None:
    resolved = resolve({"model": "resnet18", "image-size": 64, "seed": 3})
    assert resolved.workload == Workload(model="resnet18", image_size=64)
    assert resolved.config == TrainConfig(seed=3)


def test_resolve_lists_unknown_and_bad_settings_of_all_sources_together() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"epochs": 0}, file={"optimiser": "sgd", "lr": "fast"}, file_name="run.toml")
    text = str(caught.value)
    assert len(caught.value.faults) == 3
    assert "optimiser: no such setting; did you mean 'optimizer'?" in text
    assert "lr = 'fast'" in text
    assert "(from run.toml)" in text
    assert "epochs = 0" in text
    assert "(from flag)" in text


def test_lists_of_names_from_a_file_become_modules(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('modules = ["stem", "layer2"]\nbudget = "600MB"\n', encoding="utf-8")
    config = resolve({}, file=read_toml(path)).config
    assert config.modules == ("stem", "layer2")
    assert config.budget_bytes == 600_000_000


def test_absent_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_toml(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("epochs = = 2", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"not valid TOML.*line 1"):
        read_toml(broken)


@pytest.mark.parametrize("data", ["digits", "folder", "synthetic:3x8x8:2:32", "my.pictures:make"])
def test_an_orientation_of_what_has_none_is_refused_and_not_ignored(data: str) -> None:
    with pytest.raises(ConfigError, match=f"orientation = 'stored': {data} has no picture files") as caught:
        Workload(data=data, orientation="stored", weights_skip=("fc",))
    assert len(caught.value.faults) == 2
    assert caught.value.hint == "give weights; it is for folder:PATH and csv:PATH"


@pytest.mark.parametrize("kind", IN_FILES)
def test_every_kind_of_picture_files_has_an_orientation_and_a_reader(kind: str) -> None:
    assert Workload(data=f"{kind}:x", orientation="stored").orientation == "stored"
    with pytest.raises(DataError, match=f"{kind}:absent: no such"):
        pictures_named(f"{kind}:absent")
