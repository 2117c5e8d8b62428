"""A run that goes on takes up the boundary that it had, if that is whole and its own; and ends with the same bytes."""

import json
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from ondevice_trgl import Callback, RunDirError, RunState
from ondevice_trgl.report.memory import memory_notes
from tests.run.conftest import At, CrashError, Fit, crash, net, samples
from tests.run.test_resume import STEPS, Whole, pause

pytestmark = pytest.mark.usefixtures("code_pages_kept")

LAST = STEPS - 2
"""In the last part of four, the classifier, which reads boundary 3."""


class Passed(Callback):
    """Modules whose boundaries were written, and how many batches of it."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def on_cache_write(self, run: RunState) -> None:
        self.batches.append(run.module)


def files(fit: Fit, name: str = "part") -> list[str]:
    folder = fit.path(name) / "cache"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def names(boundary: int) -> list[str]:
    splits = ("test", "train", "val")
    return [f"boundary-{boundary:03d}-{split}.{kind}" for split in splits for kind in ("bin", "json")]


def events(fit: Fit, kind: str, name: str = "part") -> list[dict[str, Any]]:
    lines = (fit.path(name) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def stopped(fit: Fit, how: Any = pause, **settings: Any) -> None:
    if how is crash:
        with pytest.raises(CrashError):
            fit("part", callbacks=[At("on_step_end", LAST, crash)], **settings)
    else:
        assert fit("part", callbacks=[At("on_step_end", LAST, how)], **settings).status == "paused"


@pytest.mark.parametrize("how", [pause, crash])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_boundary_before_the_module_is_taken_up_and_nothing_is_passed_again(
    how: Any, dtype: str, fit: Fit, whole: Whole
) -> None:
    stopped(fit, how, cache_dtype=dtype)
    assert files(fit) == names(3)
    passed = Passed()
    report = fit("part", resume=True, callbacks=[passed], cache_dtype=dtype)
    assert report.status == "completed"
    assert passed.batches == []
    assert [event["boundary"] for event in events(fit, "taken_up")] == [3]
    assert fit.weights("part") == whole(cache_dtype=dtype)
    assert files(fit) == []


def test_of_two_laps_the_boundary_of_the_first_is_not_that_of_the_second(fit: Fit, whole: Whole) -> None:
    settings: dict[str, Any] = {"schedule": "multi-lap", "laps": 2}
    stopped(fit, **settings)
    kept = {name: (fit.path("part") / "cache" / name).read_bytes() for name in files(fit)}
    fit("part", resume=True, callbacks=[At("on_step_end", STEPS, pause)], **settings)  # in the last of the second lap
    for name, data in kept.items():
        (fit.path("part") / "cache" / name).write_bytes(data)
    passed = Passed()
    fit("part", resume=True, callbacks=[passed], **settings)
    assert set(passed.batches) == {0, 1, 2}
    assert fit.weights("part") == whole(**settings)


def test_damaged_chunks_alone_are_made_again(fit: Fit, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ondevice_trgl.cache.seal.CHUNK_BYTES", 4 * 6 * 6 * 6 * 3)  # three rows
    stopped(fit)
    path = fit.path("part") / "cache" / "boundary-003-train.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    data[-5] ^= 1
    path.write_bytes(data)
    fit("part", resume=True)
    (mended,) = events(fit, "mended")
    assert mended["rows"] == 3 + 2  # 26 rows: the last chunk has two
    assert events(fit, "taken_up")
    assert fit.weights("part") == whole()
    assert files(fit) == []


@pytest.mark.parametrize(
    "what",
    [
        "seal of one split",
        "a folder in its place",
        "most of it",
        "a weight",
        "a buffer",
        "the samples",
    ],
)
def test_what_is_torn_or_stale_or_foreign_is_made_again(what: str, fit: Fit) -> None:
    stopped(fit)
    cache, train = fit.path("part") / "cache", None
    if what == "seal of one split":
        (cache / "boundary-003-val.json").unlink()
    elif what == "a folder in its place":
        (cache / "boundary-003-train.bin").unlink()
        (cache / "boundary-003-train.bin" / "inside").mkdir(parents=True)
    elif what == "most of it":
        (cache / "boundary-003-train.bin").write_bytes(b"")
    elif what == "the samples":
        images, labels = samples(26).tensors
        changed = images.clone()
        changed[0, 0, 0, 0] += 1.0
        train = TensorDataset(changed, labels)
    else:
        from ondevice_trgl.model.header import read_header
        from ondevice_trgl.model.tensorfile import read_tensors, write_tensors

        file = fit.path("part") / "modules" / "001.safetensors"
        tensors, (_, metadata, _) = read_tensors(file), read_header(file)
        name = next(n for n in tensors if n.startswith("module.") and ("running_mean" in n) == (what == "a buffer"))
        tensors[name] += 0.5
        write_tensors(file, tensors, metadata)
    passed = Passed()
    assert fit("part", resume=True, callbacks=[passed], train=train).status == "completed"
    assert set(passed.batches) == {0, 1, 2}
    assert not events(fit, "taken_up")
    assert files(fit) == []


def test_a_link_in_its_place_is_refused_and_not_written_through(fit: Fit) -> None:
    stopped(fit)
    boundary = fit.path("part") / "cache" / "boundary-003-train.bin"
    boundary.rename(fit.path("elsewhere"))
    boundary.symlink_to(fit.path("elsewhere"))
    before = fit.path("elsewhere").read_bytes()
    with pytest.raises(RunDirError, match="is a link"):
        fit("part", resume=True)
    assert fit.path("elsewhere").read_bytes() == before


def test_a_run_killed_between_two_modules_takes_up_the_one_before(fit: Fit, whole: Whole) -> None:
    class Torn(Callback):
        def on_module_end(self, run: RunState) -> None:
            if run.module == 1:  # its checkpoint says done, its boundary has no seal
                raise CrashError

    with pytest.raises(CrashError):
        fit("part", callbacks=[Torn()])
    assert files(fit) == names(1)
    passed = Passed()
    fit("part", resume=True, callbacks=[passed])
    assert set(passed.batches) == {1, 2}
    assert fit.weights("part") == whole()


def test_memory_tier_leaves_nothing_and_passes_the_modules_again(fit: Fit, whole: Whole) -> None:
    stopped(fit, cache="memory")
    assert files(fit) == []
    passed = Passed()
    fit("part", resume=True, callbacks=[passed], cache="memory")
    assert set(passed.batches) == {0, 1, 2}
    assert fit.weights("part") == whole(cache="memory")


def test_a_random_dataset_is_not_taken_for_the_one_before(fit: Fit) -> None:
    class Drawn(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            image, label = self.tensors[0][index], self.tensors[1][index]
            return image + 0.01 * torch.randn(image.shape), label

    stopped(fit, train=Drawn(*samples(26).tensors))
    fit("part", model=net(), resume=True, train=Drawn(*samples(26).tensors))
    assert not events(fit, "taken_up")


def test_an_int8_cache_is_taken_up_and_the_report_says_what_was_lost(fit: Fit, whole: Whole) -> None:
    stopped(fit, cache_dtype="int8")
    report = fit("part", resume=True, cache_dtype="int8")
    assert fit.weights("part") == whole(cache_dtype="int8") != whole()
    lost = [module.cache_error for module in report.modules]
    assert [module.cache_dtype for module in report.modules] == ["int8"] * 3
    assert all(error is not None and 0 < error < 0.01 for error in lost)
    assert any(note.startswith("the cache lost 0.") for note in memory_notes(report))
    assert report.modules[0].cache_write_bytes == (26 + 9 + 9) * (6 * 36 + 6 * 8)


def test_chunks_are_drawn_in_the_same_order_after_a_resume(fit: Fit, whole: Whole) -> None:
    stopped(fit, shuffle="chunks")
    fit("part", resume=True, shuffle="chunks")
    assert len(events(fit, "taken_up")) == 1
    assert fit.weights("part") == whole(shuffle="chunks") != whole()
