"""What a run promises: one module in memory, the same result every time, nothing of the process changed."""

import contextlib
import errno
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ondevice_trgl import (
    BudgetInfeasibleError,
    Callback,
    ConfigError,
    DataError,
    PartitionError,
    RunState,
    StorageError,
    TrainConfig,
    UsageError,
)
from ondevice_trgl import trainer as trainer_module
from ondevice_trgl.cache.disk import DiskCache
from ondevice_trgl.device import meter as meters
from tests.asked_here import Trainer
from tests.run.conftest import CLASSES, At, CrashError, Fit, config, crash, net, samples

pytestmark = pytest.mark.usefixtures("code_pages_kept")


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).double().mean())


def test_it_learns(fit: Fit) -> None:
    report = fit("run", epochs=12, train=samples(90), test=samples(60, 2))
    assert [m.test_accuracy is not None and m.test_accuracy > 0.8 for m in report.modules] == [True] * 3
    assert report.accuracy.test is not None
    assert report.accuracy.test > 0.9


def test_the_saved_model_is_a_plain_state_dict_of_the_users_network(fit: Fit) -> None:
    report = fit("run", epochs=4)
    fresh = net()
    fresh.load_state_dict(load_file(fit.path("run") / "model.safetensors"), strict=True)
    assert report.classifier is not None
    assert accuracy(fresh, samples(9, 2)) == report.classifier.test_accuracy


def test_every_head_can_be_exported_with_its_reported_accuracy(fit: Fit) -> None:
    model = net()
    trainer = Trainer(model, config(), run_dir=fit.path("run"))
    with pytest.raises(UsageError, match="call fit first"):
        trainer.export()
    report = trainer.fit(samples(26), samples(9, 1), samples(9, 2))
    for head in (0, 1, 2, 3, "best", "last", 1):
        exported = trainer.export(head)
        index = head if isinstance(head, int) else report.accuracy.best_head if head == "best" else 3
        assert isinstance(index, int)
        assert accuracy(exported, samples(9, 2)) == report.heads[index].test_accuracy, head
        assert (exported is model) == (index == 3)
    for absent in (4, -1, "deepest"):
        with pytest.raises(UsageError, match="heads 0 to 3"):
            trainer.export(absent)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(fit: Fit) -> None:
    fit("one")
    fit("between", seed=5, epochs=1)  # nor has the run before, nor the global generator
    torch.rand(3)
    fit("two")
    fit("three", seed=1)
    assert fit.weights("one") == fit.weights("two")
    assert fit.weights("one") != fit.weights("three")


def test_micro_batches_are_another_way_to_the_same_step(fit: Fit) -> None:
    """Without BatchNorm in train mode the two differ by rounding alone."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.c(torch.tanh(self.b(torch.tanh(self.a(x.flatten(1))))))
            return out

    torch.manual_seed(3)
    weights = Plain().state_dict()
    for name, micro in (("full", 8), ("micro", 2)):
        model = Plain()
        model.load_state_dict(weights)
        assert fit(name, model=model, modules=2, micro_batch=micro).plan.grad_accum_steps == 8 // micro
    full, small = (load_file(fit.path(name) / "model.safetensors") for name in ("full", "micro"))
    for name in full:
        torch.testing.assert_close(full[name], small[name], rtol=1e-4, atol=1e-5)
        assert not torch.equal(full[name], weights[name])


class Watch(Callback):
    """At every hook: which tensors of the network hold memory, what lies in the cache folder."""

    def __init__(self, model: nn.Module, cache: Path) -> None:
        self.model, self.cache = model, cache
        self.alive: dict[tuple[str, int], set[str]] = {}
        self.boundaries: set[frozenset[str]] = set()

    def look(self, run: RunState) -> None:
        alive = {name for name, tensor in self.model.state_dict(keep_vars=True).items() if held(tensor)}
        self.alive.setdefault((run.phase, run.module), set()).update(alive)
        self.boundaries.add(frozenset(path.name.split("-")[1] for path in self.cache.rglob("*.bin")))

    on_step_start = on_step_end = on_cache_write = on_module_start = on_epoch_end = look


def held(tensor: Tensor) -> bool:
    gradient = tensor.grad is not None and tensor.grad.untyped_storage().nbytes() > 0
    return tensor.untyped_storage().nbytes() > 0 or gradient


@pytest.mark.parametrize("where", [None, "elsewhere"])
def test_one_module_in_memory_and_two_boundaries_on_disk_at_most(fit: Fit, where: str | None) -> None:
    model = net()
    names = list(model.state_dict())
    cache = fit.path(where) if where else fit.path("run") / "cache"
    watch = Watch(model, cache)
    report = fit("run", model=model, callbacks=[watch], cache_dir=str(cache) if where else None)
    cuts = [part.name for part in report.heads]
    assert cuts == ["stem..blocks.0", "blocks.1", "blocks.2", "classifier"]
    owned = [
        {n for n in names if n.startswith(("stem", "blocks.0"))},
        {n for n in names if n.startswith("blocks.1")},
        {n for n in names if n.startswith("blocks.2")},
        {n for n in names if n.startswith("classifier")},
    ]
    for phase in ("train", "cache"):
        for index in range(4 if phase == "train" else 3):
            assert watch.alive[phase, index] == owned[index]
    assert max(map(len, watch.boundaries)) == 2
    assert frozenset({"001", "002"}) in watch.boundaries
    assert not list(cache.rglob("*"))
    assert not any(held(tensor) for tensor in model.state_dict(keep_vars=True).values())


def test_a_resumed_run_has_one_module_in_memory_too(fit: Fit) -> None:
    fit("run", callbacks=[At("on_step_end", 13, lambda run: run.request_pause())])
    model = net()
    watch = Watch(model, fit.path("run") / "cache")
    fit("run", model=model, callbacks=[watch], resume=True)
    third = {name for name in model.state_dict() if name.startswith("blocks.2")}
    assert watch.alive["train", 2] == third


@pytest.mark.parametrize(("optimizer", "kept"), [("sgd", {"momentum"}), ("adamw", {"mean", "square", "steps"})])
def test_optimizer_state_waits_on_disk_for_the_next_lap_and_not_longer(
    fit: Fit, optimizer: str, kept: set[str]
) -> None:
    found: list[set[str]] = []

    def look(run: RunState) -> None:
        names = load_file(run.run_dir / "modules" / "001.safetensors")
        found.append({name.split(".")[1] for name in names if name.startswith("optim.")})

    laps = At("on_lap_end", 1, look), At("on_lap_end", 2, look)
    fit("run", schedule="multi-lap", laps=2, epochs=1, optimizer=optimizer, callbacks=laps)
    assert found == [kept, set()]


def test_a_second_training_in_this_process_is_refused_and_the_first_goes_on(
    fit: Fit, whole: Callable[..., bytes]
) -> None:
    refused: list[str] = []

    def another(run: RunState) -> None:
        def tried() -> None:
            for work in ("fit", "plan"):
                second = Trainer(net(), config(), run_dir=fit.path("second"))
                with pytest.raises(UsageError, match="goes on in this process") as error:
                    getattr(second, work)(samples(26))
                refused.append(error.value.hint)

        tried()
        thread = threading.Thread(target=tried)
        thread.start()
        thread.join()

    assert fit("run", callbacks=[At("on_step_end", 3, another)]).status == "completed"
    assert len(refused) == 4
    assert "a process of its own" in refused[0]
    assert not fit.path("second").exists()
    assert fit.weights("run") == whole()
    assert fit("second").status == "completed"  # one after the other they may


def test_two_runs_may_share_a_cache_folder(fit: Fit, whole: Callable[..., bytes]) -> None:
    shared = str(fit.path("shared"))

    paused = fit("outer", cache_dir=shared, callbacks=[At("on_step_end", 9, lambda run: run.request_pause())])
    assert paused.status == "paused"
    fit("inner", cache_dir=shared, epochs=1)
    fit("outer", cache_dir=shared, resume=True)
    assert fit.weights("outer") == whole()


class GlobalState:
    def __init__(self) -> None:
        self.values = (
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
            list(sys.path),
            random.getstate(),
            dict(os.environ),
            Path.cwd(),
            threading.active_count(),
        )
        self.rng = torch.get_rng_state()

    def check(self) -> None:
        now = GlobalState()
        assert now.values == self.values
        assert torch.equal(now.rng, self.rng)


@pytest.mark.parametrize("end", ["completed", "paused", "crashed", "refused", "planned"])
def test_the_process_is_left_as_it_was_and_nothing_is_printed(
    fit: Fit, end: str, capfd: pytest.CaptureFixture[str]
) -> None:
    callbacks: dict[str, list[Callback]] = {
        "paused": [At("on_step_end", 2, lambda run: run.request_pause())],
        "crashed": [At("on_step_end", 2, crash)],
    }
    threads = torch.get_num_threads()
    state = GlobalState()
    trainer = Trainer(
        net(),
        config(epochs=1, threads=threads + 1, budget=1_000 if end == "refused" else "64GB"),
        run_dir=fit.path("run"),
        callbacks=callbacks.get(end, []),
    )
    expected = {"crashed": CrashError, "refused": BudgetInfeasibleError}.get(end)
    with pytest.raises(expected) if expected else contextlib.nullcontext():
        if end == "planned":
            trainer.plan(samples(26))
        else:
            trainer.fit(samples(26), samples(9, 1))
    state.check()
    assert capfd.readouterr() == ("", "")


def test_planning_changes_neither_model_nor_disk(fit: Fit) -> None:
    model = net()
    model.stem.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Trainer(model, config(), run_dir=fit.path("run")).plan(samples(26))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.stem.training
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not fit.path("run").exists()


def test_it_works_in_a_thread_and_pauses_from_another(fit: Fit, whole: Callable[..., bytes]) -> None:
    reached, asked = threading.Event(), threading.Event()

    def wait(run: RunState) -> None:
        reached.set()
        assert asked.wait(60)

    trainer = Trainer(net(), config(), run_dir=fit.path("run"), callbacks=[At("on_step_start", 8, wait)])
    data = samples(26), samples(9, 1), samples(9, 2)
    statuses: list[str] = []
    worker = threading.Thread(target=lambda: statuses.append(trainer.fit(*data).status))
    worker.start()
    assert reached.wait(60)
    trainer.request_pause()
    asked.set()
    worker.join()
    assert statuses == ["paused"]
    fit("run", resume=True)
    assert fit.weights("run") == whole()


def test_vanilla_has_no_transport_and_a_small_tau_changes_the_weights(fit: Fit) -> None:
    off, far, near = (fit(str(tau), tau=tau) for tau in ("off", 1e30, 0.01))
    assert all(not m.transport_cost for m in off.modules)
    assert all(m.transport_cost is not None and m.transport_cost > 0 for m in near.modules)
    vanilla, weak, strong = (load_file(fit.path(n) / "model.safetensors") for n in ("off", "1e+30", "0.01"))
    assert all(torch.allclose(vanilla[name], weak[name], atol=1e-6) for name in vanilla)
    assert not all(torch.allclose(vanilla[name], strong[name], atol=1e-3) for name in vanilla)
    assert far.modules[0].train_loss == pytest.approx(off.modules[0].train_loss)


@pytest.mark.parametrize(("rows", "batch", "steps"), [(26, 8, 3), (24, 8, 3), (3, 32, 1)])
def test_a_part_of_a_batch_is_left_out_and_a_small_set_is_one_batch(
    fit: Fit, rows: int, batch: int, steps: int
) -> None:
    seen: list[int] = []

    class Steps(Callback):
        def on_step_end(self, run: RunState) -> None:
            seen.append(run.steps)

    report = fit("run", train=samples(rows), epochs=1, batch_size=batch, callbacks=[Steps()])
    assert seen == [steps] * 4 * steps  # three modules and the classifier
    assert report.plan.batch_size == min(rows, batch)
    assert report.status == "completed"


def test_a_micro_batch_that_does_not_divide_a_small_set_gives_way(fit: Fit) -> None:
    report = fit("run", train=samples(12), batch_size=32, micro_batch=8, epochs=1)
    assert (report.plan.batch_size, report.plan.micro_batch_size, report.plan.grad_accum_steps) == (12, 6, 2)
    assert any("micro-batch 6: of at most 8" in reason for reason in report.plan.reasons)


def test_without_validation_data_the_last_head_is_taken(fit: Fit) -> None:
    report = fit("run", val=None, test=None)
    assert report.accuracy.best_head == 3
    assert (report.accuracy.best_head_val, report.accuracy.test, report.accuracy.drop) == (None, None, None)


def test_the_best_head_is_chosen_on_validation_data_and_the_ensemble_is_an_exact_share(fit: Fit) -> None:
    report = fit("run", epochs=1, lr=0.01)
    values = [m.val_accuracy for m in report.heads]
    best = report.accuracy.best_head
    assert best is not None
    assert values[best] == max(v for v in values if v is not None) == report.accuracy.best_head_val
    assert report.accuracy.test == report.heads[best].test_accuracy
    assert report.accuracy.ensemble_val in [k / 9 for k in range(10)]


class FakeMeter(meters.PeakMeter):
    """Peaks by script: the first is of the set-up, each reset moves on to the next."""

    name, kind = "fake", "rss"

    def __init__(self, *peaks: int) -> None:
        self.peaks = list(peaks)

    def reset(self) -> None:
        if len(self.peaks) > 1:
            self.peaks.pop(0)

    def peak_bytes(self) -> int:
        return self.peaks[0]

    def current_bytes(self) -> int:
        return 100


@pytest.mark.parametrize(("peaks", "modules"), [((9, 1, 2, 3), [1, 2, 3]), ((1, 9, 2, 3), [9, 2, 3])])
def test_the_peak_of_the_report_is_of_the_whole_process(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, peaks: tuple[int, ...], modules: list[int]
) -> None:
    meter = FakeMeter(*(1_000_000 * peak for peak in peaks))
    monkeypatch.setattr(trainer_module, "meter_for", lambda device: meter)
    monkeypatch.setattr("ondevice_trgl.setup.helper.Lifetime.highest_bytes", lambda lifetime: 1)
    report = fit("run", epochs=1)
    assert report.measured_peak_bytes == 9_000_000
    assert [m.measured_peak_bytes for m in report.modules] == [1_000_000 * peak for peak in modules]


def test_a_peak_before_a_pause_is_not_forgotten(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    script = [FakeMeter(1, 9), FakeMeter(1, 2, 3, 4)]
    monkeypatch.setattr(trainer_module, "meter_for", lambda device: script[0])
    monkeypatch.setattr("ondevice_trgl.setup.helper.Lifetime.highest_bytes", lambda lifetime: 1)
    paused = fit("run", callbacks=[At("on_step_end", 1, lambda run: run.request_pause())])
    assert paused.modules[0].measured_peak_bytes == 9
    script.pop(0)
    report = fit("run", resume=True)
    assert report.measured_peak_bytes == 9
    assert [m.measured_peak_bytes for m in report.modules] == [9, 3, 4]


def test_a_full_disk_while_caching_leaves_the_run_resumable(
    fit: Fit, whole: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., int] = os.pwrite
    calls: list[int] = []

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        calls.append(len(data))
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(StorageError, match="No space left on device") as caught:
            fit("run")
    assert "--cache-dir" in caught.value.hint
    assert len(calls) == 3
    assert not (fit.path("run") / "cache").exists()
    fit("run", resume=True)
    assert fit.weights("run") == whole()


def test_a_disk_that_is_too_small_is_told_before_the_first_row(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr("ondevice_trgl.cache.disk.shutil.disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"boundary-001-train\.bin: No space left"):
        DiskCache(fit.path("boundary-001-train.bin"), 5, (3,), "fp32")
    assert not fit.path("boundary-001-train.bin").exists()


def labelled(labels: list[int]) -> TensorDataset:
    return TensorDataset(torch.zeros(len(labels), 1, 6, 6), torch.tensor(labels, dtype=torch.int64))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": labelled([])}, "train set is empty"),
        ({"val": labelled([])}, "val set is empty"),
        ({"train": labelled([1, 1, 1])}, "all 3 train samples are of class 1: there is nothing to learn"),
        ({"train": labelled([0, 1, 5])}, "label 5 of train sample 2 is out of range: the model has 3 outputs"),
        ({"train": labelled([0, -1, 1])}, "-1"),
        ({"test": labelled([0, 3])}, "label 3 of test sample 1"),
        ({"train": [(torch.zeros(1, 6, 6), "cat")]}, "'cat'"),
        ({"train": iter([])}, "map-style"),
    ],
)
def test_data_that_cannot_be_learnt_from(fit: Fit, splits: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit("run", **splits)
    assert not fit.path("run").exists()


def test_images_of_the_wrong_shape_for_the_model(fit: Fit) -> None:
    with pytest.raises(PartitionError, match=r"does not accept an input of shape \(2, 4, 6, 6\)") as caught:
        fit("run", train=TensorDataset(torch.zeros(6, 4, 6, 6), torch.arange(6) % 3), val=None, test=None)
    assert "channels" in caught.value.hint


def test_a_budget_is_needed_and_may_be_too_small(fit: Fit) -> None:
    with pytest.raises(ConfigError, match="budget"):
        Trainer(net(), TrainConfig(), run_dir=fit.path("run")).fit(samples(26))
    with pytest.raises(BudgetInfeasibleError) as caught:
        fit("run", budget=1)
    assert not fit.path("run").exists()
    assert caught.value.budget_bytes == 1
    assert caught.value.smallest_feasible_budget_bytes > 1_000_000


SMALLEST = """
from pathlib import Path
from ondevice_trgl.errors import BudgetInfeasibleError
from tests.run.conftest import Fit

fit = Fit(Path(FOLDER))
try:
    fit("run", budget=1)
except BudgetInfeasibleError as refusal:
    least = refusal.smallest_feasible_budget_bytes
report = fit("run", budget=least + (64 << 20))  # it was named without a rehearsal
print(report.status, report.measured_peak_bytes <= report.budget_bytes)
"""


def test_the_smallest_budget_that_a_refusal_names_trains(fit: Fit, run_python: Callable[..., str]) -> None:
    assert run_python(SMALLEST.replace("FOLDER", repr(str(fit.folder)))).split() == ["completed", "True"]


def test_an_evicted_model_is_not_trained_from_nothing(fit: Fit) -> None:
    trainer = Trainer(net(), config(epochs=1), run_dir=fit.path("run"), force=True)
    trainer.fit(samples(26))
    for again in (trainer.fit, trainer.plan):
        with pytest.raises(UsageError, match="weights are in the run directory"):
            again(samples(26))
    trainer.export()
    assert trainer.fit(samples(26)).status == "completed"


@pytest.mark.parametrize("stops", ["plan", "adopt"])
def test_a_run_that_is_refused_gives_the_model_its_weights_back(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, stops: str
) -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if stops == "plan":
        with pytest.raises(BudgetInfeasibleError):
            fit("run", model=model, budget="1MB")
    else:
        monkeypatch.setattr("ondevice_trgl.run.run_dir.RunDir.adopt", crash)
        with pytest.raises(TypeError):
            fit("run", model=model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not fit.path("run").exists()


def test_the_classifier_has_ten_times_the_epochs_or_its_own(fit: Fit) -> None:
    for name, asked, wanted in (("default", None, 10), ("own", 3, 3)):
        fit(name, epochs=1, classifier_epochs=asked)
        events = (fit.path(name) / "events.jsonl").read_text(encoding="utf-8").splitlines()
        epochs = [event["module"] for event in map(json.loads, events) if event["event"] == "epoch"]
        assert [epochs.count(module) for module in range(4)] == [1, 1, 1, wanted]


def test_an_epoch_of_all_modules_has_the_classifiers_share_in_it(fit: Fit) -> None:
    report = fit("run", epochs=1, classifier_epochs=5)
    seconds = sum(part.train_seconds or 0.0 for part in report.heads)
    assert report.seconds.per_epoch == pytest.approx(seconds + report.seconds.cache)
