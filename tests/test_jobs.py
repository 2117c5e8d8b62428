"""Jobs by name, in this process: what they write, what they refuse, how they end."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ondevice_trgl import (
    BudgetExceededError,
    BudgetInfeasibleError,
    Callback,
    ConfigError,
    DataError,
    RunDirError,
    RunState,
    TrainConfig,
    UsageError,
    baseline,
    evaluate,
    jobs,
    named,
)
from ondevice_trgl.config import Workload
from ondevice_trgl.data.registry import load_data
from ondevice_trgl.device.limit import NoLimit
from ondevice_trgl.errors import DamagedFileError, UnknownNameError
from ondevice_trgl.job import Job
from ondevice_trgl.jobs import evaluate_run, resume_job
from ondevice_trgl.model.blueprint import from_blueprint
from ondevice_trgl.model.heads import head_behind
from ondevice_trgl.model.partition import group
from ondevice_trgl.model.store import ModuleStore
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.report.model import BaselineReport, Report, read_report
from ondevice_trgl.report.text import input_lines
from ondevice_trgl.run import evaluation
from ondevice_trgl.run.batches import buffer_for
from ondevice_trgl.run.budget import Budget
from tests.asked_here import Trainer, plan_job, train_job
from tests.report_schema import SCHEMA, conforms

pytestmark = pytest.mark.usefixtures("code_pages_kept")

DATA = "synthetic:1x8x8:3:60"
OTHER = "synthetic:1x8x8:3:90"
MODEL = "resnet-preact-3x4"


def job(run_dir: Path, *, data: str = DATA, model: str = MODEL, force: bool = False, **changes: Any) -> Job:
    settings: dict[str, Any] = {
        "budget": "64GB",
        "modules": 3,
        "epochs": 2,
        "classifier_epochs": 2,
        "threads": 1,
        **changes,
    }
    workload = Workload(model=model, data=data)
    return Job(workload, TrainConfig(**settings), run_dir, force=force, baseline="skip", command="trgl-device train")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, staged and planned by processes of their own."""
    path = tmp_path_factory.mktemp("jobs") / "run"
    assert jobs.train_job(job(path)).status == "completed"
    return path


class PauseAt(Callback):
    def __init__(self, step: int) -> None:
        self.left = step

    def on_step_end(self, run: RunState) -> None:
        self.left -= 1
        if self.left == 0:
            run.request_pause()


def test_the_report_has_every_key_of_the_interface(run: Path) -> None:
    text = (run / "report.json").read_text(encoding="utf-8")
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert conforms(record, SCHEMA) == []
    assert record["status"] == "completed"
    assert record["plan"]["batch_size"] == record["plan"]["micro_batch_size"] * record["plan"]["grad_accum_steps"]
    assert len(record["modules"]) == record["plan"]["num_modules"]
    assert record["measured_peak_bytes"] >= max(module["measured_peak_bytes"] for module in record["modules"])
    assert record["measured_peak_bytes"] >= record["floor_bytes"] // 2


def test_the_last_module_has_a_head_as_those_before_it_and_the_classifier_is_one_more(run: Path) -> None:
    report = read_report(run)
    assert (len(report.modules), report.plan.num_modules, report.accuracy.head) == (3, 3, "mlp")
    assert report.classifier is not None
    assert (report.classifier.index, report.classifier.name) == (3, "pool..classifier")
    scores = [module.val_accuracy or 0.0 for module in report.modules]
    known = report.accuracy
    assert (known.last_module_val, known.last_head_val) == (scores[-1], report.classifier.val_accuracy)
    assert known.drop == max(scores) - scores[-1]
    assert known.best_head_val == max(*scores, known.last_head_val or 0.0)


def test_a_run_leaves_its_files_and_no_activations(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"report.json", "report.html", "model.safetensors", "events.jsonl", "config.json", "plan.json"} <= names
    assert "cache" not in names
    assert not [name for name in names if name.endswith(".tmp")]
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert events == ["module_start", "epoch", "epoch", "module_end"] * 4  # the classifier is one more


@pytest.mark.parametrize("head", ["best", "last", "0", "1", "2", "3"])
def test_evaluate_reproduces_the_report(run: Path, head: str) -> None:
    report = read_report(run)
    result = evaluate_run(run, head=head)
    index = result["head"]
    assert index == {"best": report.accuracy.best_head, "last": 3}.get(head, int(head) if head.isdigit() else None)
    assert result["accuracy"] == report.heads[index].test_accuracy
    assert (result["matches_report"], result["data"]) == (True, DATA)
    assert result["samples"] == report.workload["samples"]["test"]


def test_evaluate_notices_another_report(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    record = json.loads((run / "report.json").read_text(encoding="utf-8"))
    record["classifier"]["test_accuracy"] = 0.123
    (copy / "report.json").write_text(json.dumps(record), encoding="utf-8")
    assert evaluate_run(copy, head="last")["matches_report"] is False


def test_evaluate_on_other_data_compares_with_nothing(run: Path) -> None:
    assert evaluate_run(run, data=OTHER)["matches_report"] is None


@pytest.mark.parametrize(
    ("data", "what"), [("synthetic:1x9x9:3:60", "input shape"), ("synthetic:1x8x8:5:60", "not trained with: 3, 4")]
)
def test_evaluate_refuses_data_of_another_kind(run: Path, data: str, what: str) -> None:
    with pytest.raises(DataError, match=what):
        evaluate_run(run, data=data)


def test_evaluate_has_the_accuracy_of_every_head_on_the_way(run: Path) -> None:
    own = [head.test_accuracy for head in read_report(run).heads]
    assert [evaluate_run(run, head=str(k))["heads"] for k in range(4)] == [own[:1], own[:2], own[:3], own]


def test_the_ensemble_is_the_mean_of_the_probabilities_of_all_heads(run: Path) -> None:
    result = evaluate_run(run, head="ensemble")
    assert (result["head"], result["matches_report"]) == ("ensemble", None)
    chain = from_blueprint(json.loads((run / "blueprint.json").read_text(encoding="utf-8")))
    plan = Plan.from_dict(json.loads((run / "plan.json").read_text(encoding="utf-8")))
    modules, store = group(chain, plan.bounds).modules, ModuleStore(run / "modules")
    test = load_data(DATA).test
    z = torch.stack([image for image, _ in test])
    total = torch.zeros(len(test), 3)
    with torch.no_grad():
        for index, module in enumerate(modules):
            head = head_behind(module, "mlp", 3) if index < 3 else torch.nn.Identity()
            store.load(index, module, head, torch.device("cpu"))
            z = module.eval()(z)
            total += head.eval()(z).softmax(1)
    assert result["accuracy"] == float((total.argmax(1) == test.labels).double().mean())


def test_evaluate_leaves_the_run_as_it_was(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    evaluate_run(run)
    with pytest.raises(DataError):
        evaluate_run(run, data="synthetic:1x9x9:3:60")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_a_run_without_a_blueprint_is_evaluated_with_the_model_itself(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "blueprint.json").unlink()
    result = evaluate_run(copy, head="ensemble")
    assert result == evaluate_run(run, head="ensemble") | {"measured_peak_bytes": result["measured_peak_bytes"]}
    assert evaluate_run(copy)["matches_report"] is True


def test_evaluate_measures_at_the_micro_batch_of_the_report(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(args[0])
        return buffer_for(*args, **kwargs)

    monkeypatch.setattr(evaluation, "buffer_for", noted)
    evaluate_run(run, head="last", budget="32GB")
    assert sizes == [part.micro_batch_size for part in read_report(run).heads]


def test_evaluate_is_held_to_the_budget_of_the_run_or_another(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    class Limit(NoLimit):
        def set(self, budget_bytes: int) -> None:
            held.append(budget_bytes)

    monkeypatch.setattr(evaluate, "limit_for", lambda device: Limit())
    assert evaluate_run(run)["budget_bytes"] == 64 * 10**9
    assert set(held) == {64 * 10**9}
    held.clear()
    result = evaluate_run(run, budget="32GB")
    assert set(held) == {result["budget_bytes"]} == {32 * 10**9}
    assert 0 < result["measured_peak_bytes"] < 32 * 10**9


@pytest.mark.parametrize(
    ("place", "words"), [((ModuleStore, "load"), "loading module 0 needs more"), ((Budget, "make_room"), "takes more")]
)
def test_evaluate_within_too_little_names_the_way_out(
    run: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[type, str], words: str
) -> None:
    def refused(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(*place, refused)
    with pytest.raises(BudgetExceededError, match=words) as caught:
        evaluate_run(run)
    assert caught.value.hint == "evaluate with a larger --budget"
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("head", ["4", "-1", "middle"])
def test_evaluate_refuses_a_head_that_is_not_there(run: Path, head: str) -> None:
    with pytest.raises(UsageError, match="heads 0 to 3"):
        evaluate_run(run, head=head)


def test_a_finished_run_resumes_to_itself(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(named, "Session", lambda *args, **kwargs: pytest.fail("trained again"))
    assert resume_job(run).status == "completed"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_paused_job_resumes_to_the_same_model(run: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    assert train_job(job(part), [PauseAt(5)]).status == "paused"
    assert read_report(part).status == "paused"
    whole, found = read_report(run), evaluate_run(part)  # with the heads that are finished
    assert (found["accuracy"], found["matches_report"]) == (whole.modules[found["head"]].test_accuracy, True)
    assert None not in (ensemble := evaluate_run(part, head="ensemble")["heads"])
    assert len(ensemble) < 4
    with pytest.raises(UsageError, match="no head 'last': the network's own classifier is not trained to its end yet"):
        evaluate_run(part, head="last")
    assert resume_job(part).status == "completed"
    assert (part / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert evaluate_run(part)["matches_report"] is True


def test_changed_data_are_refused_on_resume(tmp_path: Path) -> None:
    train_job(job(tmp_path / "run"), [PauseAt(1)])
    record = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    record["workload"]["data"] = OTHER
    (tmp_path / "run" / "config.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(RunDirError, match="the data have changed"):
        resume_job(tmp_path / "run")


def test_a_run_of_a_program_of_its_own_is_left_to_it(tmp_path: Path) -> None:
    data = [(torch.full((1, 8, 8), float(i % 2)), i % 2) for i in range(8)]
    from ondevice_trgl.model.zoo import build_model

    model = build_model(MODEL, num_classes=2, in_shape=(1, 8, 8))
    settings = TrainConfig(budget="64GB", modules=2, epochs=1, threads=1)
    Trainer(model, settings, run_dir=tmp_path / "run", callbacks=[PauseAt(1)]).fit(data)
    with pytest.raises(RunDirError, match="a program of its own") as caught:
        resume_job(tmp_path / "run")
    assert "resume=True" in caught.value.hint


def test_a_run_that_was_interrupted_in_its_baselines_measures_them_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = dataclasses.replace(job(tmp_path / "run", epochs=1), baseline="measure")
    calls: list[str] = []

    def interrupted(*args: object, **kwargs: object) -> BaselineReport:
        raise KeyboardInterrupt

    def measured(name: str, *args: object, **kwargs: object) -> BaselineReport:
        calls.append(name)
        return BaselineReport(status="measured", batch_size=32, micro_batch_size=32, measured_peak_bytes=10**15)

    monkeypatch.setattr(baseline, "measure_baseline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_job(asked)
    monkeypatch.setattr(baseline, "measure_baseline", measured)
    report = resume_job(asked.run_dir)
    assert calls == ["e2e", "e2e_checkpoint"]
    assert report == read_report(asked.run_dir)
    assert report.savings["vs_e2e"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(("wanted", "free", "asked"), [("auto", 0, 0), ("auto", 2**60, 2), ("measure", 0, 2)])
def test_auto_measures_what_is_predicted_to_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, free: int, asked: int
) -> None:
    calls: list[str] = []

    def measured(name: str, *args: object, **kwargs: object) -> BaselineReport:
        calls.append(name)
        return BaselineReport(status="did_not_fit", batch_size=32, micro_batch_size=32)

    monkeypatch.setattr(baseline, "measure_baseline", measured)
    monkeypatch.setattr(baseline, "_free_memory", lambda: free)
    report = train_job(dataclasses.replace(job(tmp_path / "run", epochs=1), baseline=wanted))
    assert len(calls) == asked
    status = "did_not_fit" if asked else "skipped"
    assert {name: b.status for name, b in report.baselines.items()} == {"e2e": status, "e2e_checkpoint": status}
    assert report.savings == {"vs_e2e": None, "vs_e2e_checkpoint": None}
    assert all(b.reason for b in report.baselines.values()) == (not asked)


@pytest.mark.parametrize(
    ("changes", "kind", "near"),
    [
        ({"model": "resnet-smal"}, "model", "resnet-small"),
        ({"data": "digit"}, "dataset", "digits"),
        ({"data": "cifar-10"}, "dataset", "cifar10"),
    ],
)
@pytest.mark.parametrize("call", [plan_job, train_job])
def test_unknown_names(
    tmp_path: Path, call: Callable[[Job], object], changes: dict[str, Any], kind: str, near: str
) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown {kind}") as caught:
        call(job(tmp_path / "run", **changes))
    assert near in caught.value.suggestions
    assert "valid: " in caught.value.message
    assert not (tmp_path / "run").exists()


def test_a_plan_measures_nothing_and_writes_nothing(tmp_path: Path) -> None:
    report = plan_job(job(tmp_path / "run"))
    assert (report.status, report.measured_peak_bytes, report.accuracy.test) == ("planned", None, None)
    assert all(module.measured_peak_bytes is None and module.params > 0 for module in report.modules)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BudgetInfeasibleError):
        plan_job(job(tmp_path / "run", budget=1_000_000))


def test_a_taken_run_directory_is_refused_before_any_data_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "ask", lambda *args: pytest.fail("data was read"))
    with pytest.raises(RunDirError, match="not empty"):
        train_job(job(run))


def test_force_replaces_a_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train_job(job(path), [PauseAt(1)])
    assert train_job(job(path, force=True, epochs=1)).status == "completed"
    assert evaluate_run(path)["matches_report"] is True


def test_an_infeasible_budget_leaves_the_run_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "run"
    train_job(job(path), [PauseAt(1)])
    with pytest.raises(BudgetInfeasibleError):
        train_job(job(path, force=True, budget=1_000_000))
    assert resume_job(path).status == "completed"


def with_weights(asked: Job, path: Path, *skip: str) -> Job:
    return dataclasses.replace(
        asked, workload=dataclasses.replace(asked.workload, weights=str(path), weights_skip=skip or None)
    )


def test_a_run_starts_from_the_weights_it_is_given_and_goes_on_without_their_file(run: Path, tmp_path: Path) -> None:
    given = Path(shutil.copy(run / "model.safetensors", tmp_path / "w"))
    for name in ("part", "whole"):
        asked = with_weights(job(tmp_path / name, lr=1e-9), given)
        train_job(asked, [PauseAt(1)] if name == "part" else ())
    given.unlink()
    before, after = load_file(run / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    learnt = [name for name in before if name.endswith("weight")]
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in learnt)
    assert resume_job(tmp_path / "part").status == "completed"
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("part", "whole")]
    assert files[0] == files[1]
    remembered = read_report(tmp_path / "whole").workload
    assert remembered["weights"] == str(given)
    assert len(remembered["weights_digest"]) == 32
    assert "weights_digest" not in read_report(run).workload


@pytest.mark.parametrize("call", [plan_job, train_job])
def test_weights_of_another_model_are_refused_by_name(run: Path, tmp_path: Path, call: Callable[[Job], Report]) -> None:
    asked = with_weights(job(tmp_path / "run", model="resnet-preact-2x5"), run / "model.safetensors")
    with pytest.raises(ConfigError, match="classifier"):
        call(asked)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", [plan_job, train_job])
def test_a_classifier_of_other_classes_is_left_as_it_is_and_said(
    run: Path, tmp_path: Path, call: Callable[[Job], Report]
) -> None:
    asked = with_weights(job(tmp_path / "run", data="synthetic:1x8x8:5:60"), run / "model.safetensors")
    report = call(asked)
    said = "classifier is for 3 classes in model.safetensors and for 5 here: left as it is initialised"
    assert said in report.plan.reasons
    assert ("weights", said) in input_lines(report)


def test_a_file_of_weights_that_is_not_there_is_answered_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "ask", lambda *args: pytest.fail("a process was started"))
    with pytest.raises(UsageError, match="no such file"):
        plan_job(with_weights(job(tmp_path / "run"), tmp_path / "absent.pt"))


@pytest.mark.parametrize("name", ["plan.json", "config.json"])
@pytest.mark.parametrize("content", ['{"format": 2, "x": 1}', '{"format": 2, "config": [], "bounds": 3}', "torn"])
def test_a_record_that_is_not_ours_is_damaged_and_says_which(
    run: Path, tmp_path: Path, name: str, content: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / name).write_text(content, encoding="utf-8")
    with pytest.raises(DamagedFileError, match=name):
        evaluate_run(copy)
    (copy / "report.json").unlink()
    with pytest.raises(DamagedFileError, match=name):
        resume_job(copy)
