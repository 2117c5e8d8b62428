"""The command line over a stand-in for the jobs: what it asks for is recorded, what it is given is by hand."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ondevice_trgl
from ondevice_trgl.cli import main
from ondevice_trgl.job import Job
from ondevice_trgl.report.model import Report
from ondevice_trgl.run.callbacks import Callback, RunState

SAMPLE = Path(__file__).resolve().parents[1] / "report" / "sample.json"


class Jobs(ModuleType):
    """Records every call; `train` is what happens in between."""

    def __init__(self, report: Report) -> None:
        super().__init__("ondevice_trgl.jobs")
        self.report = report
        self.jobs: list[Job] = []
        self.calls: list[str] = []
        self.arguments: list[Any] = []
        self.error: BaseException | None = None
        self.peak_bytes = 400 << 20
        self.says: list[str] = []
        self.train: Callable[[tuple[Callback, ...]], None] = lambda callbacks: None

    def _result(self, call: str) -> Report:
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        return self.report

    def _tell(self, told: Callable[[str], None] | None) -> None:
        if told is not None:
            for line in self.says:
                told(line)

    def plan_job(self, job: Job, *, told: Callable[[str], None] | None) -> Report:
        self.jobs.append(job)
        self._tell(told)
        return self._result("plan")

    def train_job(
        self, job: Job, callbacks: tuple[Callback, ...] = (), *, told: Callable[[str], None] | None
    ) -> Report:
        self.jobs.append(job)
        self._tell(told)
        self.train(callbacks)
        return self._result("train")

    def resume_job(
        self, run_dir: Path, callbacks: tuple[Callback, ...] = (), *, budget: str | int | None = None
    ) -> Report:
        self.arguments.append((run_dir, budget))
        self.train(callbacks)
        return self._result("resume")

    def evaluate_run(self, run_dir: Path, **given: Any) -> dict[str, Any]:
        self.arguments.append((run_dir, given))
        self._result("evaluate")
        head: int | str = "ensemble" if given["head"] == "ensemble" else 4
        same = None if head == "ensemble" else True
        sizes: dict[str, Any] = {"budget_bytes": 600_000_000, "measured_peak_bytes": self.peak_bytes}
        about = {"data": "digits", "told": ["of these classes there are none: 7"], "matches_report": same}
        sizes |= {"metric": self.report.metric, "rmse": None}
        return {"accuracy": 0.8725, "samples": 1234, "head": head, **about, **sizes}

    def predict_run(self, run_dir: Path, paths: list[Path], **given: Any) -> dict[str, Any]:
        self.arguments.append((run_dir, paths, given))
        self._result("predict")
        cat, dog = ({"class": name, "label": k, "confidence": p} for k, name, p in ((0, "cat", 0.75), (1, "dog", 0.25)))
        found = [{"file": str(path), **cat, "top": [cat, dog][: given["top"]]} for path in paths]
        sizes = {"budget_bytes": 600_000_000, "measured_peak_bytes": self.peak_bytes}
        return {"predictions": found, "task": "classes", "head": 4, "told": ["left out: 1 .txt files"], **sizes}


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Result]
State = Callable[..., RunState]


@pytest.fixture
def report() -> Report:
    return Report.from_dict(json.loads(SAMPLE.read_text(encoding="utf-8")))


@pytest.fixture
def jobs(report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Jobs:
    stand_in = Jobs(report)
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.setattr(ondevice_trgl, "jobs", stand_in, raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("TRGL_DEBUG", "NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return stand_in


@pytest.fixture
def cli(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*argv: str) -> Result:
        capsys.readouterr()
        code = main(argv)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture
def run_dir(report: Report, tmp_path: Path) -> Path:
    """A folder with a report."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report.to_dict()), encoding="utf-8")
    return folder


@pytest.fixture
def state() -> State:
    def make(**values: Any) -> RunState:
        usual: dict[str, Any] = {
            "run_dir": Path("runs/r"),
            "phase": "train",
            "lap": 0,
            "laps": 1,
            "module": 1,
            "num_modules": 5,
            "module_name": "layer2.0",
            "epoch": 2,
            "epochs": 5,
            "step": 57,
            "steps": 120,
            "task_loss": 1.2345,
            "transport_cost": 0.0123,
            "images_per_second": 312.4,
            "peak_bytes": 402 << 20,
            "budget_bytes": 600_000_000,
            "seconds_left": 80.0,
        }
        return RunState(**(usual | values))

    return make
