"""A run that stopped anywhere ends, when it is resumed, with the very bytes that it would have ended with."""

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from ondevice_trgl import Callback, ConfigError, DataError, NonFiniteError, RunDirError, RunState, UsageError
from ondevice_trgl.report.text import seconds_line
from ondevice_trgl.run.progress import Progress
from tests.asked_here import Trainer
from tests.run.conftest import At, CrashError, Fit, config, crash, net, samples

pytestmark = pytest.mark.usefixtures("code_pages_kept")

STEPS = 4 * 2 * 3
"""3 modules, 2 epochs, 26 samples in batches of 8."""

Whole = Callable[..., bytes]
TWO_LAPS: dict[str, Any] = {"schedule": "multi-lap", "laps": 2}


def pause(run: RunState) -> None:
    run.request_pause()


@pytest.mark.parametrize("step", [3, 13])  # every step of a shorter run: below
def test_a_paused_run_resumes_bit_for_bit(fit: Fit, whole: Whole, step: int) -> None:
    assert fit("part", callbacks=[At("on_step_end", step, pause)]).status == "paused"
    assert not (fit.path("part") / "model.safetensors").exists()
    report = fit("part", resume=True)
    assert report.status == "completed"
    assert fit.weights("part") == whole()


@pytest.mark.parametrize(("optimizer", "step"), [("sgd", STEPS + 4), ("adamw", STEPS)])
def test_a_pause_in_any_lap_with_dropout_resumes_bit_for_bit(fit: Fit, whole: Whole, optimizer: str, step: int) -> None:
    settings: dict[str, Any] = {**TWO_LAPS, "optimizer": optimizer}
    fit("part", model=net(dropout=0.3), callbacks=[At("on_step_end", step, pause)], **settings)
    fit("part", model=net(dropout=0.3), resume=True, **settings)
    assert fit.weights("part") == whole(dropout=0.3, **settings)


@pytest.mark.parametrize(
    ("settings", "number"),
    [({}, 1), ({}, 8), (TWO_LAPS, 11), ({"schedule": "parallel"}, 3)],
    ids=lambda given: str(given),
)
def test_a_pause_while_a_boundary_is_written_takes_effect_at_once(
    fit: Fit, whole: Whole, settings: dict[str, Any], number: int
) -> None:
    seen: list[RunState] = []

    class Watch(Callback):
        def on_cache_write(self, run: RunState) -> None:
            seen.append(run)

    for sitting in range(2):  # the second time nothing is left to train in front of what is written
        seen.clear()
        report = fit("part", callbacks=[Watch(), At("on_cache_write", number, pause)], resume=sitting > 0, **settings)
        assert report.status == "paused"
        assert len(seen) == number, "it went on after it was asked to pause"
    events = [json.loads(line) for line in (fit.path("part") / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] == "pause"] == ["pause"] * 2
    assert fit("part", resume=True, **settings).status == "completed"
    assert fit.weights("part") == whole(**settings)


def test_a_pause_while_validating_is_taken_up_behind_the_same_epoch(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"patience": 1, "epochs": 4}
    whole = fit("whole", **settings)
    entered, validations = Progress.enter, 0

    def enter(progress: Progress, phase: str, steps: int) -> None:
        nonlocal validations
        entered(progress, phase, steps)
        if phase == "validate":
            validations += 1
            if validations == 2:
                progress.pause.set()

    monkeypatch.setattr(Progress, "enter", enter)
    assert fit("part", **settings).status == "paused"
    assert validations == 2
    report = fit("part", resume=True, **settings)
    assert report.status == "completed"
    assert fit.weights("part") == fit.weights("whole")
    assert [m.best_epoch for m in report.modules] == [m.best_epoch for m in whole.modules]


def test_an_apps_own_random_numbers_go_on_where_the_network_draws_none(fit: Fit) -> None:
    drawn: list[float] = []

    class Drawing(Callback):
        def on_step_end(self, run: RunState) -> None:
            drawn.append(random.random())

    random.seed(5)
    expected = [random.random() for _ in range(STEPS + 1)]
    random.seed(5)
    fit("run", callbacks=[Drawing()])
    assert [*drawn, random.random()] == expected[: len(drawn) + 1]
    assert len(drawn) > 10


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_a_run_that_dies_goes_on_from_its_last_checkpoint_so_many_steps_ago(
    fit: Fit, whole: Whole, schedule: str
) -> None:
    settings: dict[str, Any] = {"schedule": schedule}
    steps: list[tuple[int, int, int]] = []

    class Watch(Callback):
        def on_step_start(self, run: RunState) -> None:
            steps.append((run.module, run.epoch, run.step))

    every = {**settings, "checkpoint_every": "2steps"}
    with pytest.raises(CrashError):
        fit("part", callbacks=[Watch(), At("on_step_end", 4, crash)], **every)
    assert len(steps) == 4
    fit("part", callbacks=[Watch()], resume=True, **every)
    assert steps[4] == steps[2], "the third step's checkpoint was due, that of the fourth was cut off"
    assert fit.weights("part") == whole(**settings)


class _Skipping(nn.Module):
    """Stochastic depth by the numbers of Python and of numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.4:
            return x
        return x + self.conv(x) * (2.0 if self.training and np.random.rand() < 0.4 else 1.0)  # type: ignore[no-any-return]


def skipping() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), *(_Skipping() for _ in range(3)), nn.Flatten(), nn.Linear(64, 3)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
def test_numbers_of_python_and_numpy_go_on_where_they_were(fit: Fit, schedule: str) -> None:
    settings: dict[str, Any] = {"modules": 3, "schedule": schedule}
    random.seed(1)
    fit("whole", model=skipping(), **settings)
    random.seed(2)  # what an app does with them must not matter
    drawn = random.getstate()
    fit("part", model=skipping(), callbacks=[At("on_step_end", 2, pause)], **settings)
    assert random.getstate() == drawn
    fit("part", model=skipping(), resume=True, **settings)
    assert fit.weights("part") == fit.weights("whole")
    fit("other", model=skipping(), seed=1, **settings)
    assert fit.weights("other") != fit.weights("whole")


def test_dropout_laps_and_optimizer_each_do_something(whole: Whole) -> None:
    variants = [{}, {"dropout": 0.3}, TWO_LAPS, {"optimizer": "adamw"}]
    assert len({whole(**settings) for settings in variants}) == len(variants)


def uneven() -> TensorDataset:
    """26 samples: 20, 4 and 2 of the three classes."""
    images, labels = samples(72).tensors
    kept = torch.cat([(labels == index).nonzero().flatten()[:count] for index, count in enumerate((20, 4, 2))])
    return TensorDataset(images[kept], labels[kept])


def test_a_balanced_run_resumes_bit_for_bit_in_mid_epoch(fit: Fit) -> None:
    settings: dict[str, Any] = {**TWO_LAPS, "balance": True}
    fit("whole", train=uneven(), **settings)
    fit("plain", train=uneven(), **TWO_LAPS)
    assert fit.weights("whole") != fit.weights("plain")
    fit("part", train=uneven(), callbacks=[At("on_step_end", 2, pause)], **settings)
    with pytest.raises(RunDirError, match="made with other settings: balance"):
        fit("part", train=uneven(), resume=True, **TWO_LAPS)
    fit("part", train=uneven(), callbacks=[At("on_step_end", STEPS + 2, pause)], resume=True, **settings)
    assert fit("part", train=uneven(), resume=True, **settings).status == "completed"
    assert fit.weights("part") == fit.weights("whole")


class Seen(TensorDataset):
    """Keeps the label of every sample that is read while `counting`."""

    def __init__(self, *tensors: Any) -> None:
        super().__init__(*tensors)
        self.counting, self.labels = False, list[int]()

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        if self.counting:
            self.labels.append(int(self.tensors[1][index]))
        return self.tensors[0][index], self.tensors[1][index]


class InSteps(Callback):
    def __init__(self, data: Seen) -> None:
        self.data = data

    def on_step_start(self, run: RunState) -> None:
        self.data.counting = True

    def on_step_end(self, run: RunState) -> None:
        self.data.counting = False


def test_a_balanced_run_trains_on_all_classes_equally_often(fit: Fit) -> None:
    def trained_on(name: str, **settings: Any) -> list[int]:
        data = Seen(*uneven().tensors)
        fit(name, train=data, callbacks=[InSteps(data)], **settings)
        return torch.bincount(torch.tensor(data.labels)).tolist()

    assert trained_on("even", balance=True) == [16, 16, 16]  # two epochs of three steps of 8, by the first module
    common, _, rare = trained_on("as given")
    assert common >= 30
    assert rare <= 4


def test_a_run_may_be_paused_at_every_step(fit: Fit, whole: Whole) -> None:
    settings: dict[str, Any] = {"modules": 2, "epochs": 1}
    report = fit("part", callbacks=[At("on_step_end", 1, pause)], **settings)
    sessions = 1
    while report.status == "paused":
        report = fit("part", callbacks=[At("on_step_end", 1, pause)], resume=True, **settings)
        sessions += 1
    assert sessions == 3 * 3 + 1  # two modules and the classifier
    assert fit.weights("part") == whole(**settings)


@pytest.mark.parametrize(
    ("hook", "number", "settings"),
    [
        ("on_fit_start", 1, {}),
        ("on_module_start", 2, {}),
        ("on_epoch_end", 2, {}),
        ("on_cache_write", 9, {}),
        ("on_module_end", 3, {}),
        ("on_fit_end", 1, {}),
        ("on_cache_write", 16, TWO_LAPS),
        ("on_lap_end", 1, TWO_LAPS),
    ],
)
def test_a_crashed_run_resumes_bit_for_bit(
    fit: Fit, whole: Whole, hook: str, number: int, settings: dict[str, Any]
) -> None:
    with pytest.raises(CrashError):
        fit("part", callbacks=[At(hook, number, crash)], **settings)
    record = json.loads((fit.path("part") / "report.json").read_text(encoding="utf-8"))
    assert (record["status"], record["accuracy"]["test"]) == ("failed", None)
    assert fit("part", resume=True, **settings).status == "completed"
    assert fit.weights("part") == whole(**settings)


MULTIPLIED: dict[str, Any] = {"tau": "multiplier", "multiplier_every": 2, "multiplier_start": 0.5}


@pytest.mark.parametrize("step", [1, 8, STEPS + 5])  # between two updates, at one, in the second lap
def test_the_multiplier_stands_where_it_stood_when_a_run_is_resumed(fit: Fit, whole: Whole, step: int) -> None:
    settings = {**TWO_LAPS, **MULTIPLIED}
    fit("part", callbacks=[At("on_step_end", step, pause)], **settings)
    fit("part", resume=True, **settings)
    assert fit.weights("part") == whole(**settings)
    assert fit.weights("part") != whole(**TWO_LAPS)


def test_a_run_with_weights_of_classes_resumes_bit_for_bit(fit: Fit) -> None:
    settings: dict[str, Any] = {"class_weights": "balanced", "clip_norm": 0.5, "lr_schedule": "step", "warmup": 0.2}
    fit("whole", train=uneven(), **settings)
    fit("plain", train=uneven(), **{**settings, "class_weights": None})
    assert fit.weights("whole") != fit.weights("plain")
    fit("part", train=uneven(), callbacks=[At("on_step_end", 13, pause)], **settings)
    fit("part", train=uneven(), resume=True, **settings)
    assert fit.weights("part") == fit.weights("whole")


def test_weights_for_other_classes_are_refused_before_training(fit: Fit) -> None:
    with pytest.raises(ConfigError, match="4 numbers, and the model has 3 outputs"):
        fit("run", class_weights=(1, 2, 3, 4))
    assert not fit.path("run").exists()


def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits, labels, label_smoothing=0.1)


def test_a_loss_of_ones_own_trains_is_remembered_by_name_and_resumes(fit: Fit, whole: Whole) -> None:
    fit("part", loss=smoothed, callbacks=[At("on_step_end", 4, pause)])
    with pytest.raises(RunDirError, match="made with other settings: loss"):
        fit("part", resume=True)
    fit("part", resume=True, loss=smoothed)
    assert fit.weights("part") == whole()
    fit("other", loss=functional.multi_margin_loss)
    assert fit.weights("other") != whole()


def test_a_run_in_bf16_resumes_bit_for_bit_and_auto_is_fp32_without_it(
    fit: Fit, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ondevice_trgl.device.precision.computes_bf16", lambda device: False)
    fit("auto", precision="auto")
    assert fit.weights("auto") == whole()
    with pytest.raises(ConfigError, match="precision = 'bf16': this cpu has no"):
        fit("refused", precision="bf16")
    assert not fit.path("refused").exists()
    monkeypatch.setattr("ondevice_trgl.device.precision.computes_bf16", lambda device: True)
    report = fit("whole", precision="bf16")
    assert report.modules[-1].val_accuracy is not None
    assert fit.weights("whole") != whole()
    fit("part", precision="bf16", callbacks=[At("on_step_end", 10, pause)])
    fit("part", precision="bf16", resume=True)
    assert fit.weights("part") == fit.weights("whole")


class Losses(Callback):
    """The mean task loss of every step, by lap and module."""

    def __init__(self) -> None:
        self.losses: dict[tuple[int, int], list[float]] = {}
        self._before = 0.0

    def on_step_end(self, run: RunState) -> None:
        assert run.task_loss is not None
        total = run.task_loss * run.step
        own = self.losses.setdefault((run.lap, run.module), [])
        own.append(total - (self._before if run.step > 1 else 0.0))
        self._before = total


def test_the_multiplier_of_each_module_starts_anew_in_a_lap_and_its_end_is_reported(fit: Fit) -> None:
    seen = Losses()
    report = fit("run", callbacks=[seen], **TWO_LAPS, **MULTIPLIED)
    for index, module in enumerate(report.modules):
        assert module.multiplier == pytest.approx(0.5 + sum(seen.losses[1, index][1::2]), rel=1e-6)
    assert report.classifier is not None
    assert report.classifier.multiplier is None  # it has nothing to be transported
    record = json.loads((fit.path("run") / "report.json").read_text(encoding="utf-8"))
    assert [module["multiplier"] for module in record["modules"]] == [m.multiplier for m in report.modules]
    assert fit("plain").modules[0].multiplier is None


def test_half_first_is_another_run_and_resumes_bit_for_bit(fit: Fit, whole: Whole) -> None:
    settings: dict[str, Any] = {"tau": 0.1, "tau_depth": "half-first"}
    fit("part", callbacks=[At("on_step_end", 4, pause)], **settings)
    fit("part", resume=True, **settings)
    assert fit.weights("part") == whole(**settings)
    assert fit.weights("part") not in (whole(tau=0.1), whole(tau=0.05))


def test_a_resumed_run_reports_what_an_uninterrupted_one_does(fit: Fit) -> None:
    whole = fit("whole")
    fit("part", callbacks=[At("on_step_end", 11, pause)])  # in the last epoch of the second module
    part = fit("part", resume=True)
    assert part.accuracy == whole.accuracy
    for a, b in zip(part.modules, whole.modules, strict=True):
        assert (a.train_loss, a.transport_cost, a.val_accuracy) == (b.train_loss, b.transport_cost, b.val_accuracy)
        assert (a.cache_read_bytes, a.cache_write_bytes) == (b.cache_read_bytes, b.cache_write_bytes)
    assert part.seconds.total >= part.seconds.training + part.seconds.cache


def test_the_same_trainer_resumes_what_it_paused(fit: Fit, whole: Whole) -> None:
    trainer = Trainer(net(), config(), run_dir=fit.path("part"), callbacks=[At("on_step_end", 7, pause)])
    data = samples(26), samples(9, 1), samples(9, 2)
    assert trainer.fit(*data).status == "paused"
    assert trainer.fit(*data, resume=True).status == "completed"
    assert fit.weights("part") == whole()


def test_a_finished_run_resumes_to_itself(fit: Fit) -> None:
    first = fit("whole")
    before = fit.weights("whole")
    steps: list[int] = []
    again = fit("whole", resume=True, callbacks=[At("on_step_end", 1, lambda run: steps.append(run.step))])
    assert steps == []
    assert fit.weights("whole") == before
    assert again.accuracy == first.accuracy
    assert again.modules == first.modules


class Counter(Callback):
    """Counts the steps of all sessions."""

    def __init__(self) -> None:
        self.count = 0

    def on_step_end(self, run: RunState) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("step", [6, 10])
def test_a_callback_gets_its_state_back(fit: Fit, step: int) -> None:
    fit("part", callbacks=[Counter(), At("on_step_end", step, pause)])
    counter = Counter()
    fit("part", callbacks=[counter], resume=True)
    assert counter.count == STEPS


def test_a_callback_that_is_new_on_resume_starts_anew(fit: Fit) -> None:
    fit("part", callbacks=[At("on_step_end", 4, pause)])
    counter = Counter()
    fit("part", callbacks=[counter], resume=True)
    assert counter.count == STEPS - 4


@pytest.fixture(scope="module")
def paused(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """A run that is paused; refusing to resume it changes nothing."""
    stopped = Fit(tmp_path_factory.mktemp("paused"))
    stopped("part", callbacks=[At("on_step_end", 1, pause)])
    return stopped


@pytest.mark.parametrize(
    "changes",
    [{"lr": 0.01}, {"seed": 1}, {"epochs": 3}, {"batch_size": 4}, {"tau": "off"}, {"optimizer": "adamw"}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_are_refused(paused: Fit, changes: dict[str, Any]) -> None:
    with pytest.raises(RunDirError, match=rf"other settings: {next(iter(changes))}\b") as caught:
        paused("part", resume=True, **changes)
    assert caught.value.hint


def test_another_model_is_refused(paused: Fit) -> None:
    with pytest.raises(RunDirError, match="the model"):
        paused("part", resume=True, model=net(channels=8))


def test_other_data_are_refused(paused: Fit) -> None:
    images, labels = samples(26).tensors
    for other in (samples(27), TensorDataset(images, labels.flip(0))):
        with pytest.raises(RunDirError, match="the data"):
            paused("part", resume=True, train=other)
    with pytest.raises(RunDirError, match="the data"):
        paused("part", resume=True, val=None)


def test_nothing_to_resume(fit: Fit) -> None:
    with pytest.raises(RunDirError, match="not a run directory"):
        fit("absent", resume=True)
    assert not fit.path("absent").exists()


def test_a_run_directory_that_was_never_finished_making_is_no_run(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr("ondevice_trgl.setup.staging.write_tensors", full)
        with pytest.raises(CrashError):
            fit("part")
    with pytest.raises(RunDirError, match="not a run directory"):
        fit("part", resume=True)
    assert fit("part", force=True).status == "completed"


def poisoned(count: int, index: int, value: float) -> TensorDataset:
    images, labels = samples(count).tensors
    images[index, 0, 3, 3] = value
    return TensorDataset(images, labels)


@pytest.mark.parametrize(("index", "value", "kind"), [(0, float("nan"), "NaN"), (25, float("inf"), "infinity")])
def test_a_bad_sample_is_named_and_the_run_resumes_once_it_is_clean(
    fit: Fit, whole: Whole, index: int, value: float, kind: str
) -> None:
    with pytest.raises(NonFiniteError, match=rf"{kind} in the training data, sample {index}\b"):
        fit("part", train=poisoned(26, index, value))
    if index:  # the first samples are looked at before anything is written
        fit("part", resume=True)
        assert fit.weights("part") == whole()


@pytest.mark.parametrize(("split", "words"), [("val", "validation"), ("test", "test")])
def test_a_bad_sample_outside_of_training_is_named_too(fit: Fit, split: str, words: str) -> None:
    data: dict[str, Any] = {split: poisoned(9, 7, float("nan"))}
    with pytest.raises(NonFiniteError, match=rf"NaN in the {words} data, sample 7\b"):
        fit("part", **data)


def test_a_diverging_run_says_where_and_leaves_finite_weights(fit: Fit) -> None:
    with pytest.raises(NonFiniteError, match=r"the loss is .* lap 0, module 0 \(stem.*\), epoch 0, step [12]\b"):
        fit("part", lr=1e30)
    files = [fit.path("part") / "weights.safetensors", *(fit.path("part") / "modules").glob("*.safetensors")]
    from safetensors.torch import load_file

    tensors = [tensor for file in files for tensor in load_file(file).values()]
    assert tensors
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())
    with pytest.raises(NonFiniteError):  # it can be resumed: to the same end
        fit("part", lr=1e30, resume=True)


def test_a_module_that_diverges_in_its_last_step_is_caught_before_it_is_kept(fit: Fit) -> None:
    with pytest.raises(NonFiniteError, match="module 0"):
        fit("part", lr=1e38, epochs=1, batch_size=26)


def test_a_shape_that_differs_between_the_sets_is_refused(fit: Fit) -> None:
    wide = TensorDataset(torch.zeros(6, 1, 6, 7), torch.arange(6) % 3)
    with pytest.raises(DataError, match="val set"):
        fit("part", val=wide)
    assert not fit.path("part").exists()


def test_the_report_has_the_seconds_that_checkpoints_took(fit: Fit) -> None:
    paused = fit("part", callbacks=[At("on_step_end", 4, pause)], checkpoint_every="1steps")
    assert 0 < paused.seconds.checkpoint < paused.seconds.total
    report = fit("part", resume=True, checkpoint_every="1steps")
    assert paused.seconds.checkpoint < report.seconds.checkpoint < report.seconds.total
    assert "checkpoints " in str(seconds_line(report))


def test_auto_goes_on_where_there_is_a_run_and_begins_one_where_there_is_none(fit: Fit, whole: Whole) -> None:
    assert fit("part", callbacks=[At("on_step_end", 4, pause)], resume="auto").status == "paused"
    for _ in range(2):  # the second time there is nothing left to do
        assert fit("part", resume="auto").status == "completed"
    assert fit.weights("part") == whole()
    with pytest.raises(UsageError, match="resume = 'yes': expected True, False or 'auto'"):
        fit("part", resume="yes")


def test_what_a_set_up_that_was_cut_off_has_begun_is_no_run_and_is_replaced(fit: Fit) -> None:
    folder = fit.path("part")
    (folder / "modules").mkdir(parents=True)
    assert fit("part", resume="auto").status == "completed"
    (folder / "config.json").unlink()
    with pytest.raises(RunDirError, match="exists and is not empty"):
        fit("part")  # modules are trained
    for path in (folder / "modules").iterdir():
        path.unlink()
    assert fit("part").status == "completed"
    for path in (folder / "config.json", *(folder / "modules").iterdir()):
        path.unlink()
    (folder / "mine.txt").touch()
    with pytest.raises(RunDirError, match="exists and is not empty"):
        fit("part")
