"""Runs on augmented samples: boundaries in several views, resumed bit for bit, accuracies of samples as they are."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ondevice_trgl import Callback, RunState
from ondevice_trgl.errors import UsageError
from ondevice_trgl.plan.plan import Plan
from ondevice_trgl.run.run_dir import PLAN, read_json
from tests.run.conftest import At, CrashError, Fit, crash
from tests.run.test_resume import STEPS, Whole, pause
from tests.run.test_taken_up import LAST, Passed, events, files

pytestmark = pytest.mark.usefixtures("code_pages_kept")

AUGMENT: dict[str, Any] = {"augment": ("crop", "flip"), "views": 3}


def garbled(sample: Tensor) -> Tensor:
    return torch.full_like(sample, torch.nan)


def wider(sample: Tensor) -> Tensor:
    return torch.cat([sample, sample], -1)


def test_the_weights_are_others_and_the_same_again(fit: Fit, whole: Whole) -> None:
    once, again = fit("once", **AUGMENT), fit("again", **AUGMENT)
    assert fit.weights("once") == fit.weights("again") != whole()
    assert [module.train_accuracy for module in once.modules] == [module.train_accuracy for module in again.modules]


@pytest.mark.parametrize(
    ("settings", "how", "step"),
    [
        ({}, pause, 2),
        ({}, crash, STEPS // 2 + 1),
        ({"schedule": "multi-lap", "laps": 2}, pause, STEPS + 3),
        ({"schedule": "multi-lap", "laps": 2}, crash, STEPS + STEPS // 2),
        ({"schedule": "parallel"}, pause, 5),
        ({"balance": True, "patience": 1}, pause, STEPS // 2),
        ({"views": 1}, crash, STEPS // 2),
    ],
)
def test_a_run_that_goes_on_ends_with_the_same_bytes(
    settings: dict[str, Any], how: Any, step: int, fit: Fit, whole: Whole
) -> None:
    settings = AUGMENT | settings
    stop = [At("on_step_end", step, how)]
    if how is crash:
        with pytest.raises(CrashError):
            fit("part", callbacks=stop, **settings)
    else:
        assert fit("part", callbacks=stop, **settings).status == "paused"
    assert fit("part", resume=True, **settings).status == "completed"
    assert fit.weights("part") == whole(**settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"schedule": "parallel"}, {"train": "last"}, {"cache": "memory"}],
    ids=["sequential", "parallel", "last", "memory"],
)
def test_views_behind_a_frozen_front(settings: dict[str, Any], fit: Fit, whole: Whole) -> None:
    settings = AUGMENT | {"freeze_until": "blocks.0", "modules": "auto"} | settings
    assert fit("part", callbacks=[At("on_step_end", 3, pause)], **settings).status == "paused"
    report = fit("part", resume=True, **settings)
    assert fit.weights("part") == whole(**settings) != whole(**settings | {"augment": ("crop",)})
    rows = 26 + 9 + 9 + 2 * 26
    assert report.modules[0].passed
    assert report.modules[0].cache_write_bytes == 4 * 216 * rows


def test_every_view_is_kept_and_taken_up(fit: Fit, whole: Whole) -> None:
    assert fit("part", callbacks=[At("on_step_end", LAST, pause)], **AUGMENT).status == "paused"
    views = {name for name in files(fit) if "view" in name}
    assert views == {f"boundary-003-view{k}.{kind}" for k in (1, 2) for kind in ("bin", "json")}
    passed = Passed()
    fit("part", resume=True, callbacks=[passed], **AUGMENT)
    assert passed.batches == []
    assert events(fit, "taken_up")
    assert fit.weights("part") == whole(**AUGMENT)


def test_damaged_views_are_made_again(fit: Fit, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ondevice_trgl.cache.seal.CHUNK_BYTES", 4 * 6 * 6 * 6 * 3)  # three rows
    fit("part", callbacks=[At("on_step_end", LAST, pause)], **AUGMENT)
    path = fit.path("part") / "cache" / "boundary-003-view2.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    fit("part", resume=True, **AUGMENT)
    (mended,) = events(fit, "mended")
    assert mended["rows"] == 3
    assert fit.weights("part") == whole(**AUGMENT)


def test_the_plan_counts_every_view_and_says_so(fit: Fit) -> None:
    fit("plain")
    report = fit("views", **AUGMENT)
    plain, plan = (Plan.from_dict(read_json(fit.path(name) / PLAN)) for name in ("plain", "views"))
    rows = 26 + 9 + 9
    assert plan.cache_bytes == plain.cache_bytes // rows * (rows + 2 * 26)
    assert any(reason.startswith("3 views of each training sample are cached") for reason in plan.reasons)
    assert report.modules[0].cache_write_bytes == 4 * 216 * (rows + 2 * 26)
    assert report.predicted_write_bytes is not None
    assert report.written_bytes is not None
    assert report.written_bytes >= report.predicted_write_bytes


def test_accuracies_are_of_samples_as_they_are(fit: Fit) -> None:
    """What the function makes of them cannot be told apart; without an epoch on it, nothing is lost."""

    def grey(sample: Tensor) -> Tensor:
        return torch.zeros_like(sample)

    report = fit("run", augment=(grey,), views=2, epochs=1, classifier_epochs=1)
    same = fit("same", epochs=1, classifier_epochs=1)  # epoch 0 is view 0
    assert [m.train_accuracy for m in report.modules] == [m.train_accuracy for m in same.modules]
    assert fit.weights("run") == fit.weights("same")


def test_the_first_module_sees_a_view_of_its_own_in_every_epoch(fit: Fit) -> None:
    seen: list[float] = []

    def noted(sample: Tensor) -> Tensor:
        seen.append(float(torch.rand(())))
        return sample

    class Stop(Callback):
        def on_fit_start(self, run: RunState) -> None:
            seen.clear()  # one was tried out before

        def on_module_end(self, run: RunState) -> None:
            run.request_pause()

        def on_epoch_end(self, run: RunState) -> None:
            if run.module == 0:
                counts.append(len(set(seen)))

    counts: list[int] = []
    fit("run", augment=(noted,), views=1, epochs=4, callbacks=[Stop()])
    assert [b - a for a, b in pairwise(counts)] == [24, 24, 24]  # three batches of eight


def test_what_a_function_does_wrong_is_told_before_anything_trains(fit: Fit) -> None:
    with pytest.raises(UsageError, match=r"wider returned torch.float32 \(1, 6, 12\)"):
        fit("run", augment=(wider,))
    assert not fit.path("run").exists()


def test_nan_in_a_view_is_an_error_that_names_the_sample(fit: Fit) -> None:
    from ondevice_trgl.errors import NonFiniteError

    with pytest.raises(NonFiniteError, match="NaN in the training data, sample"):
        fit("run", augment=(garbled,))
