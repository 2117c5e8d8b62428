"""Fine-tuning: what is frozen stays as it was, bit for bit; the frozen front is passed through once, without heads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ondevice_trgl import Callback, Report, RunState, TrainConfig
from ondevice_trgl.config import Workload
from ondevice_trgl.errors import ConfigError, PartitionError, UsageError
from ondevice_trgl.export import export_run
from ondevice_trgl.job import Job
from ondevice_trgl.jobs import evaluate_run
from ondevice_trgl.report.html import to_html
from ondevice_trgl.report.text import accuracy_line, module_table, plan_line
from tests.asked_here import Trainer, train_job
from tests.run.conftest import At, Fit, Net, config, net, samples

pytestmark = pytest.mark.usefixtures("code_pages_kept")

NORMS = {f"blocks.{k}.norm" for k in range(3)}


def moved(before: dict[str, Tensor], fit: Fit, name: str = "run") -> set[str]:
    after = load_file(fit.path(name) / "model.safetensors")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def tried(fit: Fit, **settings: Any) -> tuple[Report, set[str]]:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = fit("run", model=model, **settings)
    assert all(parameter.requires_grad for parameter in model.parameters())  # the app's own model is as it was
    return report, moved(before, fit)


def test_layers_up_to_the_named_one_stay_and_have_no_head(fit: Fit) -> None:
    report, changed = tried(fit, freeze_until="blocks.0", modules="auto")
    assert {name.split(".")[0] + name.split(".")[1] for name in changed} == {"blocks1", "blocks2", "classifierweight",
                                                                             "classifierbias"}  # fmt: skip
    front, *rest = report.modules
    assert (front.name, front.passed, front.frozen) == ("stem..blocks.0", True, True)
    assert (front.train_accuracy, front.val_accuracy, front.test_accuracy, front.train_loss) == (None,) * 4
    assert front.cache_write_bytes
    assert not any(module.passed or module.frozen or module.val_accuracy is None for module in rest)
    assert report.accuracy.best_head in (1, 2)
    assert report.accuracy.last_module_val == rest[-1].val_accuracy
    assert report.seconds.per_epoch is not None
    assert "2 modules (1 frozen in front)" in plan_line(report)
    assert module_table(report).rows[0][1].text == "stem..blocks.0 (frozen)"
    assert "front" in to_html(report)


def test_named_modules_and_a_number_of_them_come_behind_the_front(fit: Fit) -> None:
    names = [module.name for module in fit("names", freeze_until="stem", modules=("blocks.1",)).modules]
    assert names == ["stem", "blocks.0..blocks.1", "blocks.2"]
    report = fit("number", freeze_until="stem", modules=2)
    assert [module.passed for module in report.modules] == [True, False, False]
    assert any("2 modules behind the frozen front, as asked" in reason for reason in report.plan.reasons)


def test_the_front_gives_what_the_network_gives_in_eval_mode(fit: Fit) -> None:
    """Exported, the frozen front and the classifier behind it are the network: its accuracy is that of the report."""
    trainer = Trainer(net(), config(freeze_until="blocks.1", modules="auto"), run_dir=fit.path("run"))
    report = trainer.fit(samples(26), samples(9, 1), samples(9, 2))
    for head in ("last", 1):
        images, labels = samples(9, 2).tensors
        with torch.no_grad():
            right = float((trainer.export(head)(images).argmax(1) == labels).double().mean())
        assert right == report.heads[-1 if head == "last" else 1].test_accuracy
    with pytest.raises(UsageError, match=r"no head '?0'?: module 0 is frozen and passed through"):
        trainer.export(0)


@pytest.mark.parametrize(("name", "near"), [("blocks.0.norm", "blocks.0"), ("blocs", "blocks"), ("classifier", None)])
def test_a_name_where_no_module_can_end(fit: Fit, name: str, near: str | None) -> None:
    with pytest.raises(PartitionError) as caught:
        fit("run", freeze_until=name)
    assert f"freeze_until = {name!r}: no boundary" in caught.value.message
    assert "blocks.0" in caught.value.hint
    if near:
        assert f"did you mean {near}" in caught.value.message
    assert not fit.path("run").exists()


def test_frozen_norms_keep_their_statistics_and_train_on(fit: Fit) -> None:
    _, changed = tried(fit, freeze_norms=True)
    statistics = {f"{norm}.{name}" for norm in NORMS for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert not changed & statistics
    assert {f"{norm}.weight" for norm in NORMS} <= changed


def test_without_norms_there_are_none_to_freeze(fit: Fit) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    with pytest.raises(UsageError, match="freeze_norms: no norm of Sequential has running statistics"):
        fit("run", model=model, modules="auto", freeze_norms=True)
    with pytest.raises(UsageError, match="train = 'norm': Sequential has no norm"):
        fit("run", model=model, modules="auto", train="norm")


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({"train": "norm"}, {f"{norm}.{name}" for norm in NORMS for name in ("weight", "bias")}),
        ({"train": "bias"}, {"stem.bias", *(f"{norm}.bias" for norm in NORMS)}),
        ({"train": "bias", "freeze_until": "blocks.0"}, {"blocks.1.norm.bias", "blocks.2.norm.bias"}),
        ({"train": "last", "modules": "auto"}, set()),
    ],
)
def test_what_trains_is_what_was_asked_for(fit: Fit, settings: dict[str, Any], trained: set[str]) -> None:
    report, changed = tried(fit, **{"freeze_norms": True, **settings})
    assert changed == trained | {"classifier.weight", "classifier.bias"}
    if settings["train"] == "last":
        assert [module.passed for module in report.modules] == [True]
        assert report.classifier is not None
        assert (report.accuracy.best_head, report.accuracy.head, report.accuracy.drop) == (1, None, None)
        assert "own classifier" in (accuracy_line(report) or "")


@pytest.mark.parametrize(
    ("settings", "step"),
    [({"schedule": "multi-lap", "laps": 2}, 14), ({"micro_batch": 2}, 2), ({"schedule": "parallel"}, 4)],
)
def test_a_paused_run_resumes_bit_for_bit(fit: Fit, settings: dict[str, Any], step: int) -> None:
    given = {"freeze_until": "blocks.0", "train": "norm", "modules": "auto", **settings}
    whole = fit("whole", **given)
    fit("part", callbacks=[At("on_step_end", step, lambda run: run.request_pause())], **given)
    part = fit("part", resume=True, **given)
    assert fit.weights("part") == fit.weights("whole")
    assert part.accuracy == whole.accuracy


def test_what_does_not_train_has_neither_gradients_nor_state(fit: Fit) -> None:
    """The optimizer's state on disk holds what trains, and the smallest budget is smaller."""
    fit("run", modules=("blocks.0",), train="norm", callbacks=[At("on_step_end", 1, lambda run: run.request_pause())])
    state = load_file(fit.path("run") / "modules" / "000.safetensors")
    own = {name for name in state if name.startswith("optim.momentum.module.")}
    assert own == {f"optim.momentum.module.blocks.0.norm.{name}" for name in ("weight", "bias")}

    def least(**settings: Any) -> int:
        wide = Net(channels=256)
        plan = Trainer(wide, config(modules=2, **settings), run_dir=fit.path("plan")).plan(samples(26))
        return max(ladder[-1].peak_bytes for ladder in plan.ladders)

    assert least(train="norm", optimizer="adamw") < least(optimizer="adamw") - 1_000_000


def test_one_module_behind_the_front_ends_in_the_classifier(fit: Fit) -> None:
    report = fit("run", freeze_until="blocks.1", modules=1)
    assert [module.passed for module in report.modules] == [True, False]
    assert report.classifier is None
    path = export_run(fit.path("run"), format="state-dict", head="1", output=fit.path("m"))
    assert {"stem.weight", "blocks.1.conv.weight", "classifier.bias"} <= load_file(path).keys()


def test_settings_that_are_none() -> None:
    wrong: dict[str, Any] = {"freeze_until": "", "freeze_norms": "yes", "train": "half"}
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=f"{name} = "):
            TrainConfig(**{name: value})


class Watch(Callback):
    """What each epoch began with: (module, epoch, whether the module's own weights moved since the one before)."""

    def __init__(self, model: Net) -> None:
        self.model, self.before, self.seen = model, torch.zeros(0), list[tuple[int, int, bool]]()

    def on_step_end(self, run: RunState) -> None:
        layer = self.model.blocks[run.module] if run.module < 3 else self.model.classifier
        now = torch.cat([p.detach().flatten() for p in layer.state_dict().values()]).double()
        if run.step > 1:
            self.seen.append((run.module, run.epoch, not torch.equal(now, self.before)))
        self.before = now


def test_heads_train_alone_first(fit: Fit) -> None:
    model = net()
    watch = Watch(model)
    report = fit("run", model=model, warm_heads=1, callbacks=[watch])
    still = {(module, epoch) for module, epoch, moves in watch.seen if not moves}
    assert still == {(0, 0), (1, 0), (2, 0)}  # statistics of norms stay too; the classifier has no head to wait for
    assert {epoch for module, epoch, _ in watch.seen if module == 1} == {0, 1, 2}
    assert {epoch for module, epoch, _ in watch.seen if module == 3} == {0, 1}
    assert report.modules[0].transport_cost
    fit("plain")
    assert fit.weights("run") != fit.weights("plain")


@pytest.mark.parametrize(
    ("settings", "step"),
    [({}, 2), ({"schedule": "multi-lap", "laps": 2}, 3), ({"tau": "multiplier", "multiplier_every": 2}, 5)],
)
def test_a_run_paused_among_its_warm_epochs_resumes_bit_for_bit(fit: Fit, settings: dict[str, Any], step: int) -> None:
    whole = fit("whole", warm_heads=2, **settings)
    fit("part", warm_heads=2, callbacks=[At("on_step_end", step, lambda run: run.request_pause())], **settings)
    part = fit("part", resume=True, warm_heads=2, **settings)
    assert fit.weights("part") == fit.weights("whole")
    assert [module.multiplier for module in part.modules] == [module.multiplier for module in whole.modules]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"modules": 1}, "warm_heads = 2: with modules = 1 there are no auxiliary heads"),
        ({"train": "last"}, "warm_heads = 2: with train = 'last' there are no auxiliary heads"),
        ({"schedule": "parallel"}, "warm_heads = 2: in the parallel schedule all modules train side by side"),
    ],
)
def test_heads_that_cannot_be_warmed(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(warm_heads=2, **settings)
    assert list(caught.value.faults) == [fault]


def test_epochs_by_depth(fit: Fit) -> None:
    def epochs(count: int, **settings: Any) -> list[int]:
        chosen = TrainConfig(**settings)
        return [chosen.epochs_of(k, count) for k in range(count)]

    assert epochs(4, epochs=5, epochs_rule="deeper") == [2, 4, 6, 8]
    assert sum(epochs(7, epochs=9, epochs_rule="deeper")) == 7 * 9
    assert epochs(10, epochs=1, epochs_rule="deeper")[0] == 1
    assert epochs(3, epochs_rule="paper") == [60, 70, 80]
    assert epochs(3, epochs_rule="paper", schedule="multi-lap", laps=5) == [12, 14, 16]
    assert TrainConfig(epochs_rule="paper").own_epochs == 60
    with pytest.raises(ConfigError, match="epochs = 9: epochs_rule = 'paper' has its own"):
        TrainConfig(epochs=9, epochs_rule="paper")
    with pytest.raises(ConfigError, match="epochs_rule = 'deeper': in the parallel schedule"):
        TrainConfig(epochs_rule="deeper", schedule="parallel")
    left: list[tuple[int, int, float | None]] = []

    class Left(Callback):
        def on_step_end(self, run: RunState) -> None:
            left.append((run.module, run.epochs, run.seconds_left))

    report = fit("run", epochs=4, epochs_rule="deeper", callbacks=[Left()])
    assert {module: count for module, count, _ in left} == {0: 2, 1: 4, 2: 6, 3: 4}
    assert left[-1][2] == pytest.approx(0.0, abs=1e-9)
    assert report.seconds.per_epoch is not None


@pytest.mark.parametrize("settings", [{"freeze_until": "blocks.0"}, {"train": "last"}])
def test_a_run_with_a_frozen_front_is_evaluated(tmp_path: Path, settings: dict[str, Any]) -> None:
    chosen = TrainConfig(budget="64GB", epochs=1, classifier_epochs=2, threads=1, **settings)
    work = Workload(model="resnet-preact-3x4", data="synthetic:1x8x8:3:60")
    report = train_job(Job(work, chosen, tmp_path / "run", baseline="skip"))
    front = report.modules[0]
    assert (front.passed, front.val_accuracy) == (True, None)
    for head in ("best", "last", "ensemble"):
        found = evaluate_run(tmp_path / "run", head=head)
        assert found["matches_report"] is (None if head == "ensemble" else True)
        assert found["heads"][0] is None
        assert None not in found["heads"][1:]
    with pytest.raises(UsageError, match="module 0 is frozen and passed through"):
        evaluate_run(tmp_path / "run", head="0")
