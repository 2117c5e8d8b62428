"""End-to-end training measured in a process of its own; what could not be measured is never a number."""

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.nn import functional

from ondevice_trgl import baseline, end_to_end
from ondevice_trgl.baseline import measure_baseline
from ondevice_trgl.config import TrainConfig, Workload
from ondevice_trgl.data.augment import Augmented
from ondevice_trgl.end_to_end import Pace
from ondevice_trgl.errors import DataError
from ondevice_trgl.job import BaselineRequest
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.report.model import BaselineReport
from ondevice_trgl.run.batches import epoch_order
from ondevice_trgl.run.guards import global_state_kept
from ondevice_trgl.trgl.loss import cross_entropy
from ondevice_trgl.workload import load_workload

WORKLOAD = Workload(model="resnet-preact-2x4", data="synthetic:1x8x8:3:20")
CONFIG = TrainConfig(budget="64GB", threads=1)


def measure(tmp_path: Path, name: str = "e2e", workload: Workload = WORKLOAD) -> BaselineReport:
    return measure_baseline(name, workload, CONFIG, batch_size=8, scratch_dir=tmp_path)


@pytest.fixture
def find_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The child finds this package and the models in `tmp_path`."""
    here = str(Path(__file__).resolve().parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, str(tmp_path)]))


@pytest.mark.usefixtures("find_package")
def test_it_is_measured_in_another_process(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    report = measure(tmp_path)
    assert (report.status, report.batch_size, report.micro_batch_size, report.reason) == ("measured", 8, 8, "")
    assert report.measured_peak_bytes is not None
    assert report.floor_bytes is not None
    assert report.measured_peak_bytes >= report.floor_bytes > 50_000_000
    assert report.seconds_per_epoch is not None
    assert report.seconds_per_epoch > 0
    assert report.timed_steps is not None
    assert report.timed_steps >= 3
    assert torch.equal(torch.get_rng_state(), before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("find_package")
def test_a_model_that_is_refused_memory_in_the_child(tmp_path: Path) -> None:
    (tmp_path / "failing_model.py").write_text("def make():\n    raise MemoryError('no more')\n", encoding="utf-8")
    report = measure(tmp_path, workload=Workload(model="failing_model:make", data="synthetic:1x8x8:3:20"))
    assert report.status == "did_not_fit"
    assert (report.measured_peak_bytes, report.seconds_per_epoch) == (None, None)
    assert "no more" in report.reason


def test_an_error_of_the_child_is_the_reason_for_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise DataError("no such file", hint="look elsewhere")

    monkeypatch.setattr(baseline, "ask", fail)
    report = measure(tmp_path)
    assert (report.status, report.reason) == ("skipped", "no such file")
    assert (report.measured_peak_bytes, report.seconds_per_epoch) == (None, None)


@pytest.mark.parametrize(
    ("code", "stderr", "status", "reason"),
    [
        (-signal.SIGKILL, "", "did_not_fit", "killed by the system"),
        (1, "noise\nDataError: absent\n", "skipped", "DataError: absent"),
        (-signal.SIGINT, "", "skipped", "interrupted"),
        (-signal.SIGSEGV, "", "skipped", "ended with status -11"),
    ],
)
@pytest.mark.parametrize("name", ["e2e", "e2e_checkpoint"])
def test_a_child_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, stderr: str, status: str, reason: str
) -> None:
    requests: list[dict[str, Any]] = []

    def run(command: list[str], *, input: str, **options: Any) -> subprocess.CompletedProcess[str]:
        assert command == [sys.executable, "-m", "ondevice_trgl.device.lean", "ondevice_trgl.baseline"]
        requests.append(json.loads(input))
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    report = measure(tmp_path, name)
    assert (report.status, report.measured_peak_bytes, report.seconds_per_epoch) == (status, None, None)
    assert reason in report.reason
    assert requests[0]["name"] == name
    assert TrainConfig(**requests[0]["config"]) == CONFIG


def refused_with(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "MemoryError"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nmore"), "[enforce fail] "),
        (RuntimeError("could not create a primitive"), "could not create a primitive"),
        (RuntimeError("CUDA out of memory."), "CUDA out of memory."),
        (refused_with(DataError("make() failed"), MemoryError("no more")), "make() failed"),
        (RuntimeError("shapes do not match"), None),
        (DataError("no such file"), None),
        (refused_with(DataError("make() failed"), ValueError("a bug")), None),
    ],
)
def test_only_a_want_of_memory_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str | None
) -> None:
    def fail(request: BaselineRequest) -> BaselineReport:
        raise error

    monkeypatch.setattr(baseline, "_measure", fail)
    asked = request(tmp_path, "e2e_accumulate", accumulate=4).to_dict()
    if reason is None:
        with pytest.raises(type(error)) as caught:
            baseline._work(asked)
        assert caught.value is error
        return
    report = BaselineReport(**json.loads(json.dumps(baseline._work(asked))))
    assert (report.status, report.batch_size, report.micro_batch_size) == ("did_not_fit", 8, 2)
    assert (report.measured_peak_bytes, report.seconds_per_epoch) == (None, None)
    assert report.reason.startswith(reason)
    assert len(report.reason.splitlines()) == 1


def request(tmp_path: Path, name: str, **changes: Any) -> BaselineRequest:
    usual: dict[str, Any] = {"workload": WORKLOAD, "config": CONFIG, "batch_size": 8, "scratch_dir": tmp_path}
    return BaselineRequest(name=name, **(usual | changes))


@pytest.mark.parametrize(
    ("name", "accumulate", "micro"),
    [("plain", 1, 8), ("e2e", 1, 8), ("e2e_accumulate", 4, 2), ("e2e_accumulate", 3, 4), ("e2e_checkpoint", 1, 8)],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_work_is_the_same_and_ends_with_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, accumulate: int, micro: int, optimizer: str
) -> None:
    sizes: list[int] = []
    loss = functional.cross_entropy

    def noted(output: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes.append(len(labels))
        return loss(output, labels, **options)

    monkeypatch.setattr(functional, "cross_entropy", noted)
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    with global_state_kept(1):
        report = baseline._measure(request(tmp_path, name, config=config, accumulate=accumulate))
    assert set(sizes) == {micro}
    assert (report.status, report.batch_size, report.micro_batch_size) == ("measured", 8, micro)
    assert report.timed_steps == len(sizes) * micro // 8 - 1  # less the one that warms up; none in validation


def test_a_batch_larger_than_the_training_set_is_all_of_it(tmp_path: Path) -> None:
    with global_state_kept(1):
        report = baseline._measure(request(tmp_path, "e2e_accumulate", batch_size=64, accumulate=3))
    assert (report.batch_size, report.micro_batch_size) == (20, 10)


def test_the_peak_includes_the_start_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "own_peak_rss", lambda: 2**50)
    with global_state_kept(1):
        assert baseline._measure(request(tmp_path, "e2e")).measured_peak_bytes == 2**50


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    model, z, labels = torch.nn.Linear(5, 3), torch.randn(8, 5), torch.arange(8) % 3
    loss = functools.partial(cross_entropy, label_smoothing=0.1, weights=torch.tensor([0.5, 1.0, 2.0]))
    end_to_end._add_gradients(model, z, labels, loss, 1.0)
    whole = model.weight.grad
    model.weight.grad = None
    for part in range(4):
        rows = slice(2 * part, 2 * part + 2)
        end_to_end._add_gradients(model, z[rows], labels[rows], loss, 0.25)
    torch.testing.assert_close(model.weight.grad, whole)


@pytest.mark.parametrize(
    ("batch", "accumulate", "micro"), [(32, 4, 8), (30, 4, 10), (31, 4, 31), (2, 4, 1), (1, 4, 1), (12, 5, 3)]
)
def test_a_batch_is_cut_into_the_most_that_divide_it(tmp_path: Path, batch: int, accumulate: int, micro: int) -> None:
    asked = request(tmp_path, "e2e_accumulate", batch_size=batch, accumulate=accumulate)
    assert asked.micro_batch(batch) == micro
    assert asked.micro_batch(batch, least=2) == max(micro, min(batch, 2))
    assert BaselineRequest.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked


@pytest.mark.parametrize("name", ["e2e", "plain"])
@pytest.mark.parametrize("balance", [True, False])
def test_a_baseline_draws_classes_as_the_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, balance: bool
) -> None:
    (tmp_path / "uneven.py").write_text(
        "import torch\n"
        "def make():\n"
        "    labels = (torch.arange(40) % 10 == 0).long()\n"
        "    images = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "    data = torch.utils.data.TensorDataset(images, labels)\n"
        "    return data, data, data\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "uneven", raising=False)
    drawn: list[int] = []
    loss = functional.cross_entropy

    def noted(output: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        drawn.extend(labels.tolist())
        return loss(output, labels, **options)

    monkeypatch.setattr(functional, "cross_entropy", noted)
    config = dataclasses.replace(CONFIG, balance=balance)
    workload = Workload(model="resnet-preact-2x4", data="uneven:make")
    with global_state_kept(1):
        baseline._measure(
            BaselineRequest(name=name, workload=workload, config=config, batch_size=8, scratch_dir=tmp_path)
        )
    epoch = drawn[:40]
    assert (epoch.count(0), epoch.count(1)) == ((20, 20) if balance else (36, 4))


@pytest.mark.parametrize("name", ["e2e", "plain", "e2e_checkpoint"])
def test_a_baseline_sees_a_view_of_its_own_in_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    views: list[int] = []
    change = Augmented.change

    def noted(self: Augmented, sample: torch.Tensor, view: int, index: int) -> None:
        views.append(view)
        change(self, sample, view, index)

    monkeypatch.setattr(Augmented, "change", noted)
    config = dataclasses.replace(CONFIG, epochs=3, augment=("crop",))
    work = Workload(model="resnet-preact-2x4", data="synthetic:1x8x8:3:120")
    asked = BaselineRequest(name=name, workload=work, config=config, batch_size=8, scratch_dir=tmp_path, full=True)
    with global_state_kept(1):
        baseline._measure(asked)
    rows = len(views) // 2
    assert rows >= 80  # of the training set; validation and test sets are left as they are
    assert views == [1] * rows + [2] * rows


@pytest.mark.parametrize("name", ["e2e", "e2e_checkpoint"])
def test_trained_to_the_end_it_is_what_plain_torch_trains(tmp_path: Path, name: str) -> None:
    clip = 0.2 if name == "e2e_checkpoint" else None
    config = dataclasses.replace(CONFIG, epochs=3, lr=0.02, label_smoothing=0.0, clip_norm=clip)
    work = Workload(model="resnet-preact-2x4", data="synthetic:1x8x8:3:120")
    with global_state_kept(1):
        report = baseline._measure(
            dataclasses.replace(request(tmp_path, name, workload=work, config=config), full=True)
        )
        data, model = load_workload(work, config.seed, tmp_path)
        rate, decay = config.learning_rate, config.weight_decay
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=config.momentum, weight_decay=decay)
        steps = len(data.train) // 8
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / steps / 3))
        )
        for epoch in range(3):
            order = epoch_order(data.train.labels, config.seed, epoch=epoch, balance=False)
            for start in range(0, 8 * steps, 8):
                images, labels = zip(*(data.train[k] for k in order[start : start + 8]), strict=True)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(torch.stack(images)), torch.tensor(labels)).backward()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
        model.eval()
        right = {
            split: [int(model(image[None]).argmax()) == label for image, label in samples]
            for split, samples in (("val", data.val), ("test", data.test))
        }
    assert (report.epochs, report.timed_steps) == (3, 3 * steps - 1)
    assert report.val_accuracy == sum(right["val"]) / len(data.val)
    assert report.test_accuracy == sum(right["test"]) / len(data.test)


@pytest.mark.parametrize("name", ["e2e", "plain"])
def test_it_has_the_loss_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "own_losses.py").write_text(
        "from torch.nn import functional\n"
        "rows = []\n"
        "def margin(logits, labels):\n"
        "    rows.append(len(labels))\n"
        "    return functional.multi_margin_loss(logits, labels)\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_losses", raising=False)
    with global_state_kept(1):
        config = dataclasses.replace(CONFIG, loss="own_losses:margin")
        report = baseline._measure(request(tmp_path, name, config=config))
    assert report.status == "measured"
    assert len(sys.modules["own_losses"].rows) > report.batch_size // report.micro_batch_size


@pytest.mark.parametrize("name", ["e2e", "e2e_checkpoint", "plain"])
def test_it_computes_in_the_precision_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen: list[torch.dtype] = []
    convolution = functional.conv2d

    def noted(z: torch.Tensor, *rest: Any) -> torch.Tensor:
        out: torch.Tensor = convolution(z, *rest)
        seen.append(out.dtype)
        return out

    monkeypatch.setattr(functional, "conv2d", noted)
    monkeypatch.setattr("ondevice_trgl.device.precision.computes_bf16", lambda device: True)
    config = dataclasses.replace(CONFIG, precision="bf16")
    with global_state_kept(1):
        assert baseline._measure(request(tmp_path, name, config=config)).status == "measured"
    assert torch.bfloat16 in seen


def test_its_rates_are_those_of_a_module_every_lap_anew() -> None:
    config = TrainConfig(
        lr=1.0, lr_schedule="step", lr_steps=(0.5,), warmup=0.2, epochs=2, laps=2, schedule="multi-lap"
    )
    rates = [Pace(config, 5, full=True).rate(done) for done in range(20)]
    assert rates[:10] == rates[10:] == [config.learning_rate_at(done / 10) for done in range(10)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[4:6] == pytest.approx([1.0, 0.1])


def test_measured_alone_it_has_no_accuracy(tmp_path: Path) -> None:
    with global_state_kept(1):
        report = baseline._measure(request(tmp_path, "e2e"))
    assert (report.epochs, report.val_accuracy, report.test_accuracy) == (None, None, None)


@pytest.mark.parametrize(("fits", "trained"), [(True, [True, False]), (False, [True, True])])
def test_what_is_trained_to_the_end_is_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool, trained: list[bool]
) -> None:
    asked: list[bool] = []

    def measured(name: str, *args: object, full: bool, **options: object) -> BaselineReport:
        asked.append(full)
        done = full and (fits or name == "e2e_checkpoint")
        status = "measured" if fits or name == "e2e_checkpoint" else "did_not_fit"
        return BaselineReport(status=status, batch_size=8, micro_batch_size=8, epochs=5 if done else None)

    monkeypatch.setattr(baseline, "measure_baseline", measured)
    plan = cast(Plan, SimpleNamespace(batch_size=8, end_to_end_bytes=10**18, num_trained=2))
    found = baseline.measure_baselines(WORKLOAD, CONFIG, plan, wanted="full", scratch_dir=tmp_path, allocator="system")
    assert asked == trained
    assert found["e2e"].status == ("measured" if fits else "did_not_fit")


@pytest.mark.parametrize("name", ["plain", "e2e", "e2e_checkpoint"])
def test_end_to_end_freezes_what_the_run_freezes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    held: list[torch.nn.Module] = []

    def kept(*given: Any) -> Any:
        data, model = load_workload(*given)
        held.append(model)
        return data, model

    monkeypatch.setattr(baseline, "load_workload", kept)
    config = dataclasses.replace(CONFIG, freeze_until="blocks.0", freeze_norms=True, train="norm")
    with global_state_kept(1):
        baseline._measure(request(tmp_path, name, config=config))
        _, before = load_workload(WORKLOAD, config.seed, tmp_path)
    after = held[0].state_dict()
    changed = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after[name])}
    own = {"classifier.weight", "classifier.bias"}
    assert own < changed
    norms = {f"blocks.1.{norm}.{name}" for norm in ("bn1", "bn2") for name in ("weight", "bias")}
    assert changed == own | norms
