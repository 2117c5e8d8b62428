"""Pictures are decoded once, by a process of their own, and read by every later one where they lie."""

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from ondevice_trgl.data import assemble, folders, prepare_child, prepared
from ondevice_trgl.data.decode import Fit, decode, decode_bytes
from ondevice_trgl.data.folders import picture_files
from ondevice_trgl.data.prepare_child import Progress, prepare
from ondevice_trgl.data.prepared import find, key_of, make_room, prepared_dir, store
from ondevice_trgl.data.records import FileRecords
from ondevice_trgl.data.registry import load_data
from ondevice_trgl.device.meter import own_peak_rss
from ondevice_trgl.errors import BudgetInfeasibleError, DataError, StorageError
from ondevice_trgl.processes import ask

Image = pytest.importorskip("PIL.Image")
FIT = Fit(3, 8, 8)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of ten pictures, every one in another colour."""
    for label, name in enumerate("ab"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (12, 9), (200 * label, 10 * index, 5)).save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"))


def content_of(folder: Path) -> bytes:
    return b"".join(decode(path, FIT) for path in files_of(folder))


def made() -> list[str]:
    """What is in the cache folder, without the keys."""
    return sorted(path.suffix for path in prepared_dir().iterdir())


def unasked(*given: object, **more: object) -> dict[str, Any]:
    raise AssertionError("it was decoded again")


def samples(folder: Path, **asked: Any) -> tuple[str, list[tuple[float, int]]]:
    data = load_data(f"folder:{folder}", image_size=8, **asked)
    parts = (data.train, data.val, data.test)
    return data.digest, [
        (float(image.sum()), label) for part in parts for image, label in part if isinstance(label, int)
    ]


def test_what_was_decoded_is_not_decoded_again(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = samples(pictures)
    assert made() == [".json", ".u8"]
    monkeypatch.setattr(folders, "ask", unasked)
    assert samples(pictures) == first


def test_many_records_are_read_where_they_lie(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = samples(pictures, seed=3)
    monkeypatch.setattr(assemble, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(assemble, "keep_records", unasked)
    data = load_data(f"folder:{pictures}", image_size=8, seed=3)
    assert isinstance(data.train._records, FileRecords)  # type: ignore[attr-defined]
    assert samples(pictures, seed=3) == in_memory


def test_a_limit_on_training_samples_leaves_them_where_they_lie(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = samples(pictures, train_limit=4)
    monkeypatch.setattr(assemble, "IN_MEMORY_BYTES", 0)
    assert samples(pictures, train_limit=4) == in_memory


def test_what_is_prepared_depends_on_files_and_form_alone(pictures: Path) -> None:
    files = files_of(pictures)
    key = key_of(files, FIT)
    assert key == key_of(files, Fit(3, 8, 8, "exif"))
    others = [key_of(files, fit) for fit in (Fit(3, 8, 9), Fit(1, 8, 8), Fit(3, 8, 8, "stored"))]
    others += [key_of(files[::-1], FIT), key_of(files[1:], FIT)]
    os.utime(files[3], ns=(5, 5))
    others.append(key_of(files, FIT))
    assert len({key, *others}) == 7


def test_a_picture_that_was_replaced_is_decoded_anew_whatever_time_it_is_given(tmp_path: Path) -> None:
    """A bitmap has the same size whatever it shows, and rsync, tar and cp -p set the time of a file."""
    path = tmp_path / "a.bmp"
    Image.new("RGB", (8, 8), (200, 0, 0)).save(path)
    before, key = path.stat(), key_of([path], FIT)
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the system's clock has ticks
        Image.new("RGB", (8, 8), (0, 0, 200)).save(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert key_of([path], FIT) != key


@pytest.mark.parametrize("harm", ["short", "long", "no sidecar", "another's sidecar", "no JSON", "gone"])
def test_a_file_that_is_torn_or_foreign_is_made_again(pictures: Path, harm: str) -> None:
    first = samples(pictures)
    (record,), (sidecar,) = (list(prepared_dir().glob(f"*.{suffix}")) for suffix in ("u8", "json"))
    whole = record.read_bytes()
    assert whole == content_of(pictures)
    match harm:
        case "short":
            record.write_bytes(whole[:-1])
        case "long":
            record.write_bytes(whole + b"x")
        case "no sidecar":
            sidecar.unlink()
        case "another's sidecar":
            sidecar.write_text(json.dumps({"count": 20, "record_bytes": 4}))
        case "no JSON":
            sidecar.write_text("[")
        case "gone":
            record.unlink()
    assert samples(pictures) == first
    assert record.read_bytes() == whole
    assert json.loads(sidecar.read_text())["count"] == 20


def test_without_a_cache_folder_the_result_is_the_same(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = samples(pictures)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert samples(pictures, scratch_dir=tmp_path / "scratch") == first
    assert list((tmp_path / "scratch").iterdir()) == [], "a file without a name"
    monkeypatch.setattr(assemble, "IN_MEMORY_BYTES", 0)
    assert samples(pictures, scratch_dir=tmp_path / "scratch") == first
    with pytest.raises(StorageError, match=r"cannot write to .*file"):
        samples(pictures, scratch_dir=tmp_path / "file")


def test_a_disk_that_is_full_is_told_with_what_is_needed(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    request = {"fit": vars(FIT), "files": [str(path) for path in files_of(pictures)]}
    monkeypatch.setattr(prepare_child, "store", full)
    assert prepare(request)["stored"] is False
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(StorageError, match="cannot write the 3840 bytes of the pictures: No space left"):
            prepare({**request, "output": descriptor})
    finally:
        os.close(descriptor)


def test_a_damaged_picture_is_named_and_leaves_nothing(pictures: Path) -> None:
    (pictures / "b" / "9.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"b/9\.png cannot be read as an image"):
        samples(pictures)
    assert made() == []


def test_those_not_used_for_longest_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "MOST_BYTES", 350)
    day = 24 * 3600
    ages = {"old.u8": 4, "kept.u8": 3, "younger.u8": 2, "youngest.u8": 1, "dead.u8.x.part": 9, "alive.u8.y.part": 1}
    for name, age in ages.items():
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (100 * day - age * day / 2,) * 2)
    (tmp_path / "old.json").write_text("{}")
    os.utime(tmp_path / "old.json", (0, 0))
    with (tmp_path / "old.u8").open("rb") as in_use:
        make_room(tmp_path, 120, ["kept"])
        assert in_use.read() == bytes(100), "whoever has it open goes on"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["alive.u8.y.part", "kept.u8", "youngest.u8"]


def test_there_are_only_so_many_however_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "MOST_FILES", 3)
    for age, name in enumerate(("a.u8", "b.u8", "c.u8", "d.u8")):
        (tmp_path / name).write_bytes(b"1")
        os.utime(tmp_path / name, (1000 + age,) * 2)
    make_room(tmp_path, 1, ["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.u8", "d.u8"], "and one more is to come"


def test_what_is_read_counts_as_used(pictures: Path) -> None:
    files = files_of(pictures)
    store(key_of(files, FIT), [decode(path, FIT) for path in files], len(files), FIT)
    (path,) = prepared_dir().glob("*.u8")
    os.utime(path, (0, 0))
    file = find(path.stem, len(files), FIT.record_bytes)
    assert file is not None
    file.close()
    assert path.stat().st_mtime > 0


def test_several_processes_may_prepare_the_same(pictures: Path) -> None:
    request = {"fit": vars(FIT), "files": [str(path) for path in files_of(pictures)]}
    answers: list[dict[str, Any]] = []
    both = [threading.Thread(target=lambda: answers.append(ask("prepare", request))) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert [answer["stored"] for answer in answers] == [True, True]
    assert made() == [".json", ".u8"]
    assert next(prepared_dir().glob("*.u8")).read_bytes() == content_of(pictures)


def test_a_picture_that_does_not_fit_is_named_with_the_budget_that_it_needs(pictures: Path, tmp_path: Path) -> None:
    for name, side in (("large", 2000), ("largest", 2500), ("small", 40)):
        Image.new("RGB", (side, side)).save(pictures / "a" / f"{name}.png")
    files = files_of(pictures)
    takes = decode_bytes(pictures / "a" / "largest.png", FIT)
    request = {"fit": vars(FIT), "files": [str(path) for path in files], "caller_bytes": 30_000_000}
    with pytest.raises(BudgetInfeasibleError, match=r"decoding .*a/largest\.png \(2500x2500 pixels\) takes") as caught:
        prepare({**request, "budget_bytes": own_peak_rss() + 40_000_000})
    needed = caught.value.smallest_feasible_budget_bytes
    assert needed > own_peak_rss() + 30_000_000 + takes
    assert f"{needed // 1_000_000}MB" in caught.value.hint
    assert made() == []
    answer = ask("prepare", {**request, "budget_bytes": needed})
    assert answer["stored"]
    assert answer["peak_bytes"] <= needed


def test_it_is_refused_where_nothing_can_be_kept_either(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(prepare_child, "store", full)
    request = {"fit": vars(FIT), "files": [str(path) for path in files_of(pictures)], "caller_bytes": 0}
    with pytest.raises(BudgetInfeasibleError, match=r"decoding .* \(12x9 pixels\) takes"):
        prepare({**request, "budget_bytes": 1_000_000})
    # whoever holds 200 MB will have it decoded later, as nothing was kept
    budget = {**request, "budget_bytes": own_peak_rss() + 150_000_000}
    assert prepare(budget)["stored"] is False
    with pytest.raises(BudgetInfeasibleError, match="decoding") as caught:
        prepare({**budget, "holder_bytes": 200_000_000})
    assert caught.value.smallest_feasible_budget_bytes > own_peak_rss() + 200_000_000
    assert f"or let {prepared_dir()} be written" in caught.value.hint


def test_a_dataset_is_prepared_by_name_split_by_split(pictures: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "both").mkdir(exist_ok=True)
        (tmp_path / "both" / split).symlink_to(pictures)
    ask("prepare", {"fit": vars(FIT), "data": f"folder:{tmp_path / 'both'}"})
    assert made() == [".json", ".json", ".u8", ".u8"]


def test_nothing_is_decoded_where_there_is_one_class(pictures: Path) -> None:
    (pictures / "b" / "0.png").write_bytes(b"no picture")
    (pictures / "only").mkdir()
    (pictures / "b").rename(pictures / "only" / "b")
    assert ask("prepare", {"fit": vars(FIT), "data": f"folder:{pictures / 'only'}"})["stored"]
    assert not prepared_dir().exists()


def test_what_decodes_holds_no_torch(run_python: Any) -> None:
    run_python(
        "import ondevice_trgl.data.prepare_child, sys\n"
        "assert not {'torch', 'torchvision', 'numpy', 'PIL.Image'} & set(sys.modules), sorted(sys.modules)"
    )


def test_files_that_are_named_are_read_in_their_order(pictures: Path) -> None:
    files = files_of(pictures)[::-1]
    found = picture_files(files, FIT)
    rows = [bytes(row.tolist()) for rows in found.part.stream() for row in rows]
    assert rows == [decode(path, FIT) for path in files]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.09, []), (0.11, [f"preparing 2,000 pictures: {10 * tenth}%" for tenth in range(1, 11)])],
    ids=["a moment", "longer"],
)
def test_progress_is_told_where_it_takes_longer_than_a_moment(seconds: float, said: list[str]) -> None:
    lines: list[str] = []
    ticks = iter(seconds * index / 100 for index in range(10_000))
    now = 0.0

    def clock() -> float:
        return now

    progress = Progress(2000, lines.append, clock)
    for _ in range(2000):
        now = next(ticks)
        progress.step()
    assert lines == said


def test_progress_reaches_whoever_asked(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Progress):
        def __init__(self, count: int, say: Any) -> None:
            super().__init__(count, say, iter(range(10_000)).__next__)

    lines: list[str] = []
    monkeypatch.setattr(prepare_child, "Progress", Slow)
    monkeypatch.setattr(prepare_child, "tell", lines.append)
    request = {"fit": vars(FIT), "files": [str(path) for path in files_of(pictures)]}
    prepare(request)
    assert lines == []
    (prepared_dir() / f"{key_of(files_of(pictures), FIT)}.json").unlink()
    prepare({**request, "tell": True})
    assert lines[0] == "preparing 20 pictures: 10%"
    assert lines[-1] == "preparing 20 pictures: 100%"
