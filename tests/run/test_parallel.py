"""The parallel schedule: every batch through all modules, each with a step of its own on detached inputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from ondevice_trgl import BudgetInfeasibleError, Report, RunState, TrainConfig
from ondevice_trgl.config import Workload
from ondevice_trgl.job import Job
from ondevice_trgl.jobs import evaluate_run
from ondevice_trgl.model.partition import group
from ondevice_trgl.model.tensorfile import read_tensors
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.run.batches import epoch_order, train_batches
from ondevice_trgl.run.opening import chain_of, fresh_head, sources
from ondevice_trgl.run.run_dir import PLAN, RunDir
from tests.asked_here import train_job
from tests.run.conftest import At, CrashError, Fit, config, crash, net, samples

pytestmark = pytest.mark.usefixtures("code_pages_kept")

PARALLEL: dict[str, Any] = {"schedule": "parallel"}
STEPS = 2 * 3
"""2 epochs, 26 samples in batches of 8: then come two epochs of the classifier."""


def pause(run: RunState) -> None:
    run.request_pause()


def reference(plan: Plan, **settings: Any) -> dict[str, torch.Tensor]:
    """The same training written plainly: torch.optim, a loop over modules inside a loop over batches."""
    chosen, model = config(**PARALLEL, **settings), net()
    data = sources(samples(26), None, None)["train"]
    chain = chain_of(model, {"train": data})
    partition = group(chain, plan.bounds)
    modules = partition.modules[: plan.num_modules]
    heads = [fresh_head(chain, partition, chosen, k) for k in range(len(modules))]
    optimizers = []
    for module, head in zip(modules, heads, strict=True):
        assert head is not None
        every = [*module.parameters(), *head.parameters()]
        groups = [
            {"params": [p for p in every if p.ndim >= 2], "weight_decay": chosen.weight_decay},
            {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizers.append(torch.optim.SGD(groups, lr=0.0, momentum=chosen.momentum))
        module.train()
        head.train()
    steps = done = 0
    buffer = torch.zeros(8, *data.shape)
    for epoch in range(chosen.epochs):
        order = epoch_order(data.labels, chosen.seed, 0, 0, epoch=epoch, balance=False)
        steps = len(order) // 8 * chosen.epochs
        for micro_batches in train_batches(data, order, 8, buffer):
            for z, labels in micro_batches:
                for module, head, optimizer in zip(modules, heads, optimizers, strict=True):
                    assert head is not None
                    optimizer.zero_grad()
                    z = module(z.detach())
                    functional.cross_entropy(head(z), labels, label_smoothing=chosen.label_smoothing).backward()
                    for one in optimizer.param_groups:
                        one["lr"] = chosen.learning_rate_at(done / steps)
                    optimizer.step()
            done += 1
    return dict(model.state_dict())


def test_it_is_what_a_plain_loop_over_modules_trains(fit: Fit) -> None:
    fit("run", tau="off", **PARALLEL)
    plan = RunDir.open(fit.path("run")).load(PLAN, Plan.from_dict)
    assert (plan.num_modules, plan.classifier) == (3, True)
    expected = reference(plan, tau="off")
    for name, value in read_tensors(fit.path("run") / "model.safetensors").items():
        if not name.startswith("classifier."):
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_parts_of_it_do_something(fit: Fit, whole: Any) -> None:
    assert len({whole(), whole(**PARALLEL), whole(**PARALLEL, tau=0.01)}) == 3


@pytest.mark.parametrize("settings", [{"micro_batch": 2}, {"optimizer": "adamw"}, {"balance": True}])
def test_micro_batches_and_other_settings_train_too(fit: Fit, settings: dict[str, Any]) -> None:
    report = fit("run", **PARALLEL, **settings)
    assert report.status == "completed"
    assert report.plan.schedule == "parallel"
    assert all(m.train_accuracy is not None and m.cache_read_bytes == 0 for m in report.modules)


def test_micro_batches_change_nothing_without_batch_norm(fit: Fit) -> None:
    def trained(name: str, **settings: Any) -> dict[str, torch.Tensor]:
        model = net()
        for block in model.blocks:
            block.norm = nn.Identity()
        fit(name, model=model, tau=0.1, **PARALLEL, **settings)
        return read_tensors(fit.path(name) / "model.safetensors")

    full, parts = trained("full"), trained("parts", micro_batch=2)
    for name, value in full.items():
        torch.testing.assert_close(value, parts[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("step", [5, STEPS + 2])  # between two updates of the multiplier; the classifier
def test_a_paused_run_resumes_bit_for_bit(fit: Fit, whole: Any, step: int) -> None:
    settings: dict[str, Any] = {**PARALLEL, "optimizer": "adamw", "tau": "multiplier", "multiplier_every": 2}
    assert (
        fit("part", model=net(dropout=0.3), callbacks=[At("on_step_end", step, pause)], **settings).status == "paused"
    )
    report = fit("part", model=net(dropout=0.3), resume=True, **settings)
    assert report.status == "completed"
    assert fit.weights("part") == whole(dropout=0.3, **settings)
    assert [(m.multiplier or 0.0) > 2.0 for m in report.modules] == [True] * 3


@pytest.mark.parametrize(
    ("hook", "number"),
    [
        ("on_module_start", 1),
        ("on_module_start", 2),
        ("on_step_start", 5),
        ("on_cache_write", 1),
        ("on_module_end", 1),
        ("on_lap_end", 1),
    ],
)
def test_a_crashed_run_resumes_bit_for_bit(fit: Fit, whole: Any, hook: str, number: int) -> None:
    with pytest.raises(CrashError):
        fit("part", callbacks=[At(hook, number, crash)], **PARALLEL)
    assert fit("part", resume=True, **PARALLEL).status == "completed"
    assert fit.weights("part") == whole(**PARALLEL)


def test_a_run_that_is_killed_while_it_saves_resumes_bit_for_bit(
    fit: Fit, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the modules are saved: none of them counts, and all go on from the checkpoint before."""
    from ondevice_trgl.model.store import ModuleStore
    from ondevice_trgl.run import checkpointer

    monkeypatch.setattr(checkpointer.Checkpointer, "is_due", lambda self: True)  # a checkpoint a step
    real, saves = ModuleStore.save, []

    def save(self: ModuleStore, *args: Any, **kwargs: Any) -> int:
        saves.append(kwargs.get("pending"))
        if len(saves) == 3 + 2:  # the second module's second checkpoint
            raise CrashError("killed")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ModuleStore, "save", save)
    with pytest.raises(CrashError):
        fit("part", **PARALLEL)
    assert saves == [True] * 5
    assert len(list((fit.path("part") / "modules").glob("*.pending"))) == 1
    monkeypatch.undo()
    fit("part", resume=True, **PARALLEL)
    assert fit.weights("part") == whole(**PARALLEL)


def test_frozen_modules_are_passed_on(fit: Fit) -> None:
    model = net()
    for layer in (model.stem, model.blocks[0]):
        layer.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = fit("run", model=model, **PARALLEL)
    after = read_tensors(fit.path("run") / "model.safetensors")
    changed = {name.split(".")[1] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed >= {"1", "2"}
    assert "0" not in changed
    assert report.modules[0].frozen
    assert report.modules[0].val_accuracy is not None


def test_one_module_alone(fit: Fit) -> None:
    report = fit("run", modules=1, **PARALLEL)
    assert report.status == "completed"
    assert report.plan.cache.bytes == 0


def test_the_plan_counts_what_stays_in_memory(fit: Fit) -> None:
    def planned(name: str, **settings: Any) -> Report:
        return fit(name, model=net(channels=96), optimizer="adamw", **settings)

    alone, together = planned("alone"), planned("together", **PARALLEL)
    for row, other in zip(alone.modules, together.modules, strict=True):
        assert row.predicted_breakdown is not None
        assert other.predicted_breakdown is not None
        assert row.predicted_breakdown["others"] == 0
        two_blocks = 2 * 96 * 96 * 9 * 4 * 3  # weights, and two numbers of AdamW for each
        assert other.predicted_breakdown["others"] > two_blocks * 0.9
    assert together.classifier is not None
    assert together.classifier.predicted_breakdown is not None
    assert together.classifier.predicted_breakdown["others"] == 0, "it trains alone, behind them"
    with pytest.raises(BudgetInfeasibleError):
        planned("small", **PARALLEL, **{"budget": "100MB"})


def test_the_accuracies_of_a_run_come_out_again_when_it_is_evaluated(tmp_path: Path) -> None:
    """Module by module on disk there, all in memory at once here."""
    workload = Workload(model="resnet-preact-3x4", data="synthetic:1x8x8:3:90")
    chosen = TrainConfig(budget="64GB", modules=3, epochs=1, batch_size=16, threads=1, **PARALLEL)
    report = train_job(Job(workload, chosen, tmp_path / "run", baseline="skip"))
    assert report.status == "completed"
    for head in ("0", "2", "last"):
        assert evaluate_run(tmp_path / "run", head=head)["matches_report"] is True


@pytest.mark.parametrize(("hook", "number"), [("on_cache_write", 2), ("on_step_end", 3)])
def test_a_frozen_front_is_passed_once_and_its_cache_read_by_every_epoch(
    fit: Fit, whole: Any, hook: str, number: int
) -> None:
    settings: dict[str, Any] = {**PARALLEL, "modules": 2, "freeze_until": "blocks.0"}
    with pytest.raises(CrashError):
        fit("part", callbacks=[At(hook, number, crash)], **settings)
    report = fit("part", resume=True, **settings)
    assert fit.weights("part") == whole(**settings)
    front, *others = report.modules
    assert front.passed
    assert [module.passed for module in others] == [False, False]
    assert (front.cache_write_bytes or 0) > 0
    rows, feature = 26 + 9 + 9, 6 * 6 * 6 * 4  # of the front and, once, of the last module: both stand at a time
    assert report.plan.cache.bytes == 2 * rows * feature
