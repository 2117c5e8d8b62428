"""What is made before training: a plan leaves no trace, a run that was created resumes, a refusal leaves nothing."""

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
    jobs,
    trainer,
)
from ondevice_trgl.config import Workload
from ondevice_trgl.device.limit import NoLimit
from ondevice_trgl.device.meter import PeakMeter, own_peak_rss
from ondevice_trgl.errors import ProcessDiedError
from ondevice_trgl.job import Job
from ondevice_trgl.jobs import evaluate_run, resume_job
from ondevice_trgl.report.model import read_report
from ondevice_trgl.run.run_dir import RunDir
from ondevice_trgl.setup import helper, staging, steps
from ondevice_trgl.setup.steps import set_up, staging_folder
from tests.asked_here import ask_here, plan_job, train_job

pytestmark = pytest.mark.usefixtures("code_pages_kept")

DATA = "synthetic:1x8x8:3:60"
OWN = """
import torch

class Twice(torch.nn.Module):
    def forward(self, x):
        return x * 2

class Net(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(i, 4, 3, padding=1) for i in (1, 4, 4, 4))
        self.classifier = torch.nn.Linear(4, classes)
        self.scale = {scale}

    def forward(self, x):
        x = x * self.scale if isinstance(self.scale, torch.Tensor) else self.scale(x)
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


def created(asked: Job) -> None:
    with staging_folder(asked.run_dir) as folder:
        set_up(asked, folder, ask_here)
        RunDir.adopt(folder, asked.run_dir)


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
        weights.append([(tmp_path / name / "weights.safetensors").read_bytes()])
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


@pytest.mark.parametrize("call", [plan_job, train_job])
def test_a_refused_budget_leaves_nothing(tmp_path: Path, call: Any) -> None:
    with pytest.raises(BudgetInfeasibleError):
        call(job(tmp_path / "run", budget=1_000_000))
    assert entries(tmp_path) == []


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


def test_a_run_that_was_never_finished_making_is_replaced_but_for_anothers_files(tmp_path: Path) -> None:
    created(job(tmp_path / "run"))
    (tmp_path / "run" / "config.json").unlink()
    (tmp_path / "run" / "mine.txt").touch()
    for force in (False, True):
        with pytest.raises(RunDirError, match=r"not empty|is not a run directory"):
            train_job(job(tmp_path / "run", force=force))
    (tmp_path / "run" / "mine.txt").unlink()
    assert train_job(job(tmp_path / "run")).status == "completed"


@pytest.mark.parametrize("there", [False, True])
def test_an_interrupted_child_leaves_nothing(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "run").mkdir()

    def interrupted(name: str, request: dict[str, Any], **_: Any) -> dict[str, Any]:
        (Path(request["folder"]) / "weights.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.train_job(job(tmp_path / "run"), ask=interrupted)
    assert entries(tmp_path) == (["run"] if there else [])


def test_a_child_that_dies_leaves_nothing(tmp_path: Path) -> None:
    def died(name: str, request: dict[str, Any], **_: Any) -> dict[str, Any]:
        raise ProcessDiedError(f"the {name} process failed", returncode=-9, hint="memory")

    with pytest.raises(ProcessDiedError, match="the stage process failed") as caught:
        jobs.plan_job(job(tmp_path / "run"), ask=died)
    assert caught.value.exit_code == 1
    assert entries(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Path.mkdir

    def denied(path: Path, *args: Any, **options: Any) -> None:
        if path.name.startswith(".trgl-"):
            raise PermissionError(13, "Permission denied")
        made(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(RunDirError, match="cannot be written: Permission denied") as caught:
        train_job(job(tmp_path / "run"))
    assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize(("scale", "blueprint"), [("torch.tensor(2.0)", True), ("Twice()", False)])
def test_a_model_of_the_users_trains_and_resumes_with_or_without_a_blueprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: str, blueprint: bool
) -> None:
    name = f"own_net_{'with' if blueprint else 'without'}_blueprint"
    (tmp_path / f"{name}.py").write_text(OWN.replace("{scale}", scale), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    whole, part = (job(tmp_path / folder, model=f"{name}:make") for folder in ("whole", "part"))
    assert train_job(whole).status == "completed"
    assert (whole.run_dir / "blueprint.json").is_file() is blueprint
    notes = [reason for reason in read_report(whole.run_dir).plan.reasons if "the network's own code" in reason]
    assert [note.partition(": ")[2] for note in notes] == ([] if blueprint else [f"scale is a {name}.Twice"])
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
    meter = helper.Lifetime(device, others=7)
    found = []
    for peak in (30, 50, 20):
        device.peak = peak
        found.append(meter.highest_bytes())
        assert meter.peak_bytes() == peak
        meter.reset()
    assert found == [37, 57, 57]
    device.kind = "cuda"
    assert helper.Lifetime(device, others=7).highest_bytes() == 0


class Refusing:
    """Asked to stage or plan, refuses budgets below `least`, each time naming `named`."""

    def __init__(self, least: int, named: int) -> None:
        self.least, self.named = least, named
        self.tried: list[int] = []

    def __call__(self, name: str, request: dict[str, Any], **_: Any) -> dict[str, Any]:
        if name == "plan":
            return {"peak_bytes": 1}
        budget = int(Job.from_dict(request["job"]).config.budget_bytes or 0)
        self.tried.append(budget)
        if budget < self.least:
            raise BudgetInfeasibleError(
                f"{budget} is too small", budget_bytes=budget, smallest_feasible_budget_bytes=self.named, hint="a;b"
            )
        return {"peak_bytes": 1}


def test_a_refusal_names_a_budget_that_was_tried(tmp_path: Path) -> None:
    refusing = Refusing(104_000_000, 100_000_000)
    with pytest.raises(BudgetInfeasibleError, match=r"^1000000 is too small") as caught:
        jobs.train_job(job(tmp_path / "run", budget="1MB"), ask=refusing)
    assert refusing.tried == [1_000_000, 100_000_000, 101_000_000, 104_000_000]
    refusal = caught.value
    assert (refusal.budget_bytes, refusal.smallest_feasible_budget_bytes) == (1_000_000, 104_000_000)
    assert refusal.hint == "the smallest feasible budget is 104MB;b"
    assert entries(tmp_path) == []


def test_a_budget_that_the_machine_has_no_memory_for_is_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = Refusing(104_000_000, 100_000_000)
    monkeypatch.setattr(steps, "usable_ram_bytes", lambda: 100_500_000)
    with pytest.raises(BudgetInfeasibleError) as caught:
        jobs.plan_job(job(tmp_path / "run", budget="1MB"), ask=refusing)
    assert refusing.tried == [1_000_000, 100_000_000]
    assert caught.value.smallest_feasible_budget_bytes == 101_000_000


@pytest.mark.long
def test_setting_up_that_lacks_memory_is_refused_with_a_budget_that_works(tmp_path: Path) -> None:
    with pytest.raises(BudgetInfeasibleError) as caught:
        jobs.plan_job(job(tmp_path / "run", budget="120MB"))
    needed = caught.value.smallest_feasible_budget_bytes
    assert 120_000_000 < needed < 400_000_000 + own_peak_rss()  # this process waits, and counts
    assert jobs.plan_job(job(tmp_path / "run", budget=needed)).status == "planned"
    assert entries(tmp_path) == []


class Crashing(Refusing):
    """Ends by a signal, where `Refusing` would refuse."""

    def __call__(self, name: str, request: dict[str, Any], **_: Any) -> dict[str, Any]:
        try:
            return super().__call__(name, request)
        except BudgetInfeasibleError:
            raise ProcessDiedError("the stage process failed: status -11", returncode=-11) from None


def test_a_process_that_crashes_for_want_of_memory_is_a_refusal(tmp_path: Path) -> None:
    crashing = Crashing(110_000_000, 0)
    with pytest.raises(BudgetInfeasibleError) as caught:
        jobs.train_job(job(tmp_path / "run", budget="100MB"), ask=crashing)
    assert caught.value.smallest_feasible_budget_bytes == crashing.tried[-1] >= 110_000_000
    assert entries(tmp_path) == []


def test_a_process_that_crashes_however_much_there_is_is_no_refusal(tmp_path: Path) -> None:
    with pytest.raises(ProcessDiedError, match="status -11"):
        jobs.train_job(job(tmp_path / "run", budget="100MB"), ask=Crashing(10**15, 0))
    assert entries(tmp_path) == []


class Watched(NoLimit):
    """A limit that remembers whether it is set."""

    held: int | None = None

    def set(self, budget_bytes: int) -> None:
        self.held = budget_bytes

    def lift(self) -> None:
        self.held = None


@pytest.mark.parametrize("lacks", [False, True])
def test_an_app_without_room_for_a_second_process_measures_within_its_budget(
    lacks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, seen = Watched(), []

    def measure(*args: Any) -> None:
        seen.append(limit.held)
        if lacks:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 70000000000 bytes.")
        staging.measure(*args)

    monkeypatch.setattr(trainer, "_LEAST_ROOM_BYTES", 10**15)
    monkeypatch.setattr(trainer, "limit_for", lambda device: limit)
    monkeypatch.setattr(trainer, "measure", measure)
    data = torch.utils.data.TensorDataset(torch.randn(12, 1, 8, 8), torch.arange(12) % 3)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 3))
    app = trainer.Trainer(model, TrainConfig(budget=64 * 10**9, batch_size=4, threads=1), run_dir=tmp_path / "run")
    if lacks:
        with pytest.raises(BudgetInfeasibleError) as caught:
            app.plan(data)
        assert caught.value.smallest_feasible_budget_bytes > 70 * 10**9
    else:
        assert app.plan(data).num_modules >= 1
    assert seen == [64 * 10**9]
    assert limit.held is None
