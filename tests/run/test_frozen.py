"""Layers with requires_grad = False: what is frozen stays as it was, bit for bit, and what is not learns."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ondevice_trgl import UsageError
from ondevice_trgl.model.trace import trace
from ondevice_trgl.plan.estimate import estimate
from ondevice_trgl.report.text import module_table
from tests.asked_here import Trainer
from tests.run.conftest import At, Fit, Net, config, net, samples

pytestmark = pytest.mark.usefixtures("code_pages_kept")

PARTS = {0: ("stem.", "blocks.0."), 1: ("blocks.1.",), 2: ("blocks.2.", "classifier.")}


def frozen_net(*modules: int, keep: tuple[str, ...] = (), **kwargs: Any) -> Net:
    """`net`, modules of which are frozen but for the layers `keep`."""
    model = net(**kwargs)
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(part for k in modules for part in PARTS[k])) and not name.startswith(keep or ("-",)):
            parameter.requires_grad_(False)
    return model


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def of(*modules: int) -> tuple[str, ...]:
    return tuple(part for k in modules for part in PARTS[k])


@pytest.mark.parametrize("frozen", [(1,), (0, 1), (0, 2)])
def test_frozen_modules_do_not_move_and_the_others_do(fit: Fit, frozen: tuple[int, ...]) -> None:
    model = frozen_net(*frozen, dropout=0.3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = fit("run", model=model)
    after = load_file(fit.path("run") / "model.safetensors")
    changed = moved(before, after)
    assert not {name for name in changed if name.startswith(of(*frozen))}  # nor statistics of norms
    for index in set(PARTS) - set(frozen):
        assert any(name.startswith(of(index)) for name in changed)
    assert [module.frozen for module in report.modules] == [index in frozen for index in PARTS]
    assert all(module.val_accuracy is not None for module in report.modules)
    assert report.seconds.per_epoch is not None
    shown = [row[1].text for row in module_table(report).rows]
    assert shown.pop().endswith("(own classifier) (frozen)" if 2 in frozen else "(own classifier)")
    assert [text.endswith("(frozen)") for text in shown] == [index in frozen for index in PARTS]


def test_the_head_of_a_frozen_module_learns(fit: Fit) -> None:
    """On cross-entropy alone: a module that stays where it is has no transport to be charged for."""
    report = fit("run", model=frozen_net(0), epochs=12, train=samples(90), test=samples(60, 2))
    first = report.modules[0]
    assert first.test_accuracy is not None
    assert first.test_accuracy > 0.8
    assert not first.transport_cost


def test_a_module_that_is_frozen_in_part(fit: Fit) -> None:
    model = frozen_net(1, keep=("blocks.1.norm",))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = fit("run", model=model)
    changed = moved(before, load_file(fit.path("run") / "model.safetensors"))
    assert "blocks.1.conv.weight" not in changed
    assert {"blocks.1.norm.weight", "blocks.1.norm.running_mean"} <= changed
    assert not any(module.frozen for module in report.modules)


@pytest.mark.parametrize("settings", [{"schedule": "multi-lap", "laps": 2}, {"optimizer": "adamw"}, {"micro_batch": 4}])
def test_other_ways_to_train_it(fit: Fit, settings: dict[str, Any]) -> None:
    model = frozen_net(0, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert fit("run", model=model, **settings).status == "completed"
    changed = moved(before, load_file(fit.path("run") / "model.safetensors"))
    assert {name.split(".")[1] for name in changed} == {"1"}


def test_a_run_with_frozen_modules_can_be_resumed(fit: Fit) -> None:
    fit("whole", model=frozen_net(0, 2))
    fit("parts", model=frozen_net(0, 2), callbacks=[At("on_step_end", 9, lambda run: run.request_pause())])
    assert fit("parts", model=frozen_net(0, 2), resume=True).status == "completed"
    assert fit.weights("whole") == fit.weights("parts")


def test_export_gives_the_frozen_weights_back(fit: Fit) -> None:
    model = frozen_net(0, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(model, config(), run_dir=fit.path("run"))
    report = trainer.fit(samples(26), samples(9, 1), samples(9, 2))
    exported = trainer.export("last")
    assert not {name for name in moved(before, exported.state_dict()) if name.startswith(of(0, 1))}
    images, labels = samples(9, 2).tensors
    with torch.no_grad():
        right = float((exported(images).argmax(1) == labels).double().mean())
    assert right == report.heads[-1].test_accuracy


@pytest.mark.parametrize("unused", [False, True])
def test_a_network_that_is_frozen_whole_is_refused(fit: Fit, unused: bool) -> None:
    model = frozen_net(0, 1, 2)
    if unused:
        model.add_module("unused", nn.Linear(2, 2))
    with pytest.raises(UsageError, match=r"nothing to train: all \d+ parameters of Net are frozen.*\n.*requires_grad_"):
        fit("run", model=model)
    assert not fit.path("run").exists()
    with pytest.raises(UsageError, match="nothing to train"):
        Trainer(model, config(), run_dir=fit.path("run")).plan(samples(26))
    assert model.stem.weight.numel()


def test_frozen_weights_have_no_gradient_and_no_state_in_the_estimate() -> None:
    settings = config(optimizer="adamw")
    whole, part = (estimate(trace(model, torch.randn(2, 1, 6, 6)), settings) for model in (net(), frozen_net(1)))
    for free, frozen in zip(whole.segments, part.segments, strict=True):
        assert free.parameters + free.buffers == frozen.parameters + frozen.buffers
    tensors = [costs.tensors(2, 3, 8, accumulate=False) for costs in (whole, part)]
    assert tensors[0].weights == tensors[1].weights
    assert (tensors[1].gradients, tensors[1].optimizer) != (tensors[0].gradients, tensors[0].optimizer)
    assert part.segments[2].parameters == 0
