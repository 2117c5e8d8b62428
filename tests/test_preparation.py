"""What is made before training: a plan leaves no trace, a run that was created resumes, a refusal leaves nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ondevice_trgl import (
    BudgetInfeasibleError,
    Callback,
    RunDirError,
    RunState,
    TrainConfig,
    TrglError,
    jobs,
    measuring,
)
from ondevice_trgl.config import Workload
from ondevice_trgl.device.meter import PeakMeter, own_peak_rss
from ondevice_trgl.job import Job
from ondevice_trgl.jobs import evaluate_run, plan_job, resume_job, train_job
from ondevice_trgl.processes import Ended
from tests.prepared_here import prepared_here

DATA = "synthetic:1x8x8:3:60"
OWN = """
import torch

class Net(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(i, 4, 3, padding=1) for i in (1, 4, 4, 4))
        self.classifier = torch.nn.Linear(4, classes)
        self.scale = {scale}

    def forward(self, x):
        x = x * self.scale
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.classifier(x.mean((2, 3)))

def make(num_classes):
    return Net(num_classes)
"""


def job(run_dir: Path, *, model: str = "resnet-preact-3x4", force: bool = False, **changes: Any) -> Job:
    settings: dict[str, Any] = {"budget": "64GB", "modules": 3, "epochs": 1, "threads": 1, **changes}
    return Job(Workload(model=model, data=DATA), TrainConfig(**settings), run_dir, force=force, baseline="skip")


class PauseAt(Callback):
    def __init__(self, step: int) -> None:
        self.left = step

    def on_step_end(self, run: RunState) -> None:
        self.left -= 1
        if self.left == 0:
            run.request_pause()


@pytest.fixture(autouse=True)
def here(request: pytest.FixtureRequest) -> Iterator[None]:
    if "a_real_process" in request.fixturenames:
        yield
    else:
        with prepared_here():
            yield


@pytest.fixture
def a_real_process() -> None:
    """The child is one."""


def created(asked: Job) -> None:
    assert jobs._prepared(asked, "create")["peak_bytes"] > 10_000_000


def entries(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_plan_makes_no_run_directory(tmp_path: Path) -> None:
    assert plan_job(job(tmp_path / "a" / "run")).status == "planned"
    assert entries(tmp_path) == []


def test_what_was_created_resumes_to_what_training_gives(tmp_path: Path) -> None:
    created(job(tmp_path / "created"))
    assert entries(tmp_path)[0] == "created"
    assert (tmp_path / "created" / "blueprint.json").is_file()
    assert resume_job(tmp_path / "created").status == "completed"
    train_job(job(tmp_path / "trained"))
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("created", "trained")]
    assert models[0] == models[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["created", "trained"]  # no temporary folder


def test_the_seed_alone_decides_the_first_weights(tmp_path: Path) -> None:
    weights: list[list[bytes]] = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(weights))
        before = torch.get_rng_state()
        created(job(tmp_path / name, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        weights.append([path.read_bytes() for path in sorted((tmp_path / name / "modules").iterdir())])
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


@pytest.mark.parametrize("call", [plan_job, train_job])
def test_a_refused_budget_leaves_nothing(tmp_path: Path, call: Any) -> None:
    with pytest.raises(BudgetInfeasibleError):
        call(job(tmp_path / "run", budget=1_000_000))
    assert entries(tmp_path) == []


@pytest.mark.usefixtures("a_real_process")
def test_a_refused_budget_leaves_nothing_in_a_folder_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(BudgetInfeasibleError) as caught:
        train_job(job(tmp_path / "run", budget=1_000_000))
    assert caught.value.budget_bytes == 1_000_000
    assert caught.value.smallest_feasible_budget_bytes > 50_000_000
    assert entries(tmp_path) == ["run"]


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert train_job(job(tmp_path / "run")).status == "completed"
    assert not [name for name in entries(tmp_path) if ".trgl-" in name]


def test_force_replaces_a_run_that_was_never_finished_making(tmp_path: Path) -> None:
    created(job(tmp_path / "run"))
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(RunDirError, match="not empty"):
        train_job(job(tmp_path / "run"))
    assert train_job(job(tmp_path / "run", force=True)).status == "completed"


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_child_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    if there:
        (tmp_path / "run").mkdir()

    def interrupted(module: str, request: dict[str, Any]) -> Ended:
        (Path(request["scratch"]) / "weights.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_job(job(tmp_path / "run"))
    assert entries(tmp_path) == (["run"] if there else [])


@pytest.mark.parametrize(
    ("ended", "hint"),
    [
        (Ended(None, -9, "the process ended with status -9"), "memory"),
        (Ended(None, 1, "ValueError: a bug", "Traceback: here"), ""),
    ],
)
def test_a_child_that_dies_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: Ended, hint: str
) -> None:
    monkeypatch.setattr(jobs, "ask", lambda module, request: ended)
    with pytest.raises(TrglError, match=rf"planning failed: {ended.last_words}") as caught:
        plan_job(job(tmp_path / "run"))
    assert (caught.value.exit_code, hint in caught.value.hint) == (1, True)
    assert caught.value.__notes__ == [ended.stderr]
    assert entries(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryDirectory", denied)
    with pytest.raises(RunDirError, match="cannot be written: Permission denied") as caught:
        train_job(job(tmp_path / "run"))
    assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize(("scale", "blueprint"), [("2.0", True), ("torch.tensor(2.0)", False)])
def test_a_model_of_the_users_trains_and_resumes_with_or_without_a_blueprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str, blueprint: bool
) -> None:
    name = f"own_net_{'with' if blueprint else 'without'}_blueprint"
    (tmp_path / f"{name}.py").write_text(OWN.replace("{scale}", scale), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    whole, part = (job(tmp_path / folder, model=f"{name}:make") for folder in ("whole", "part"))
    assert train_job(whole).status == "completed"
    assert (whole.run_dir / "blueprint.json").is_file() is blueprint
    events = [json.loads(line) for line in (whole.run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    reasons = [event["reason"] for event in events if event["event"] == "no_blueprint"]
    assert reasons == ([] if blueprint else ["scale is a constant of the trace"])
    assert evaluate_run(whole.run_dir)["matches_report"] is True
    assert train_job(part, [PauseAt(2)]).status == "paused"
    assert resume_job(part.run_dir).status == "completed"
    models = [(asked.run_dir / "model.safetensors").read_bytes() for asked in (whole, part)]
    assert models[0] == models[1]
    assert not list(tmp_path.glob(".trgl-*"))


class Script(PeakMeter):
    """Peaks by hand."""

    name, kind = "script", "rss"

    def __init__(self) -> None:
        self.peak = 0

    def reset(self) -> None:
        self.peak = 1

    def peak_bytes(self) -> int:
        return self.peak

    def current_bytes(self) -> int:
        return 1


def test_the_peak_of_setting_up_is_the_highest_whoever_reset_the_meter() -> None:
    device = Script()
    meter = measuring.Lifetime(device, others=7)
    found = []
    for peak in (30, 50, 20):
        device.peak = peak
        found.append(meter.highest_bytes())
        assert meter.peak_bytes() == peak
        meter.reset()
    assert found == [37, 57, 57]
    device.kind = "cuda"
    assert measuring.Lifetime(device, others=7).highest_bytes() == 0


def refusing_below(least: int, named: int) -> Any:
    """A `jobs._set_up` that refuses budgets below `least`, each time naming `named`."""

    def set_up(asked: Job, what: str) -> dict[str, Any]:
        budget = asked.config.budget_bytes or 0
        tried.append((budget, what))
        if budget < least:
            raise BudgetInfeasibleError(
                f"{budget} is too small", budget_bytes=budget, smallest_feasible_budget_bytes=named, hint="a;b"
            )
        return {}

    tried: list[tuple[int, str]] = []
    set_up.tried = tried  # type: ignore[attr-defined]
    return set_up


def test_a_refusal_names_a_budget_that_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up = refusing_below(104_000_000, 100_000_000)
    monkeypatch.setattr(jobs, "_set_up", set_up)
    with pytest.raises(BudgetInfeasibleError, match=r"^1000000 is too small") as caught:
        train_job(job(tmp_path / "run", budget="1MB"))
    sizes = [size for size, _ in set_up.tried]
    assert sizes == [1_000_000, 100_000_000, 101_000_000, 104_000_000]
    assert [what for _, what in set_up.tried[1:]] == ["plan"] * 3
    refusal = caught.value
    assert (refusal.budget_bytes, refusal.smallest_feasible_budget_bytes) == (1_000_000, sizes[-1])
    assert refusal.hint == "the smallest feasible budget is 104MB;b"


def test_a_budget_that_the_machine_has_no_memory_for_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up = refusing_below(104_000_000, 100_000_000)
    monkeypatch.setattr(jobs, "_set_up", set_up)
    monkeypatch.setattr(jobs, "usable_ram_bytes", lambda: 100_500_000)
    with pytest.raises(BudgetInfeasibleError) as caught:
        plan_job(job(tmp_path / "run", budget="1MB"))
    assert [size for size, _ in set_up.tried] == [1_000_000, 100_000_000]
    assert caught.value.smallest_feasible_budget_bytes == 101_000_000


@pytest.mark.usefixtures("a_real_process")
def test_setting_up_that_lacks_memory_is_refused_with_a_budget_that_works(tmp_path: Path) -> None:
    with pytest.raises(BudgetInfeasibleError) as caught:
        plan_job(job(tmp_path / "run", budget="120MB"))
    needed = caught.value.smallest_feasible_budget_bytes
    assert 120_000_000 < needed < 400_000_000 + own_peak_rss()  # this process waits, and counts
    assert plan_job(job(tmp_path / "run", budget=needed)).status == "planned"
    assert entries(tmp_path) == []
