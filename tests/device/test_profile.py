"""Device profiles: those in the package, files of the user's, and this machine."""

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from ondevice_trgl.device import profile
from ondevice_trgl.device.profile import detect, load_profile, profile_names, settings
from ondevice_trgl.errors import ConfigError, UnknownNameError
from ondevice_trgl.resolved import resolve

GOOD = """
title = "A board"
device = "cpu"
threads = 2
ram = "1GiB"
reserve = "256MiB"
disk_read_per_second = "40MB"
disk_write_per_second = "20MB"
disk_quota = "4GB"
sources = ["its data sheet"]
"""


def test_the_promised_profiles_are_there() -> None:
    assert set(profile_names()) >= {
        "raspberry-pi-4-2gb",
        "raspberry-pi-5-4gb",
        "jetson-orin-nano-8gb",
        "jetson-nano-4gb",
        "android-phone-6gb",
        "laptop-8gb",
    }
    assert profile_names() == sorted(profile_names())


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_is_sound(name: str) -> None:
    loaded = load_profile(name)
    gigabytes = int(name.rpartition("-")[2].removesuffix("gb"))
    assert loaded.name == name
    assert loaded.ram_bytes == gigabytes << 30
    # less than a process that has imported torch could not train anything
    assert 500e6 < loaded.default_budget < loaded.ram_bytes
    assert loaded.disk_read_bytes_per_second is not None
    assert loaded.disk_write_bytes_per_second is not None
    assert 0 < loaded.disk_write_bytes_per_second <= loaded.disk_read_bytes_per_second
    assert any("https://" in source for source in loaded.sources)
    assert json.loads(json.dumps(loaded.to_dict()))["default_budget_bytes"] == loaded.default_budget


def test_a_profile_may_say_what_its_flash_memory_stands(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(GOOD)
    assert load_profile(path).flash_endurance_bytes is None
    path.write_text(GOOD + 'flash_endurance = "30000GB"\n')
    assert load_profile(path).flash_endurance_bytes == 30 * 10**12
    path.write_text(GOOD + "flash_endurance = true\n")
    with pytest.raises(ConfigError, match="flash_endurance = True: "):
        load_profile(path)


@pytest.mark.parametrize("name", profile_names())
def test_settings_are_taken_by_the_configuration(name: str) -> None:
    loaded = load_profile(name)
    resolved = resolve({}, profile=settings(loaded))
    assert resolved.config.budget_bytes == loaded.default_budget
    assert resolved.config.threads == loaded.threads
    assert resolved.config.cache_limit == loaded.disk_quota_bytes
    assert resolved.origins["budget"] == "profile"


def test_a_file_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "my-board.toml"
    path.write_text(GOOD, encoding="utf-8")
    for given in (path, str(path)):
        loaded = load_profile(given)
        assert (loaded.name, loaded.threads, loaded.default_budget) == ("my-board", 2, 768 << 20)
        assert loaded.sources == ("its data sheet",)


def test_profiles_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(FrozenInstanceError):
        load_profile("laptop-8gb").threads = 9  # type: ignore[misc]


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean raspberry-pi-4-2gb") as caught:
        load_profile("raspberry-pi4-2gb")
    assert "laptop-8gb" in str(caught.value)


def test_an_absent_file_lists_the_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml: No such file.*\n.*laptop-8gb"):
        load_profile(tmp_path / "none.toml")


def test_a_file_that_is_not_toml(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("ram = ", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_profile(path)


def test_every_fault_of_a_file_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        """
title = " "
device = "tpu"
threads = 0
ram = "1GiB"
reserve = "2GiB"
disk_read_per_second = "fast"
disk_write_per_second = -3
disk_qouta = "1GB"
sources = []
""",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    faults = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 9
    assert "disk_qouta: no such key; did you mean 'disk_quota'?" in faults
    assert "disk_quota: missing" in faults
    assert "device = 'tpu': expected cpu | cuda" in faults
    assert "reserve = '2GiB': must be less than ram = '1GiB'" in faults
    for key in ("title", "threads", "disk_read_per_second", "disk_write_per_second", "sources"):
        assert f"{key} = " in faults


@pytest.mark.parametrize("value", ["true", "1.5", '"2"'])
def test_threads_must_be_a_whole_number(value: str, tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(GOOD.replace("threads = 2", f"threads = {value}"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"threads = .*whole number"):
        load_profile(path)


@pytest.mark.parametrize(
    ("ram", "reserve"), [(1 << 30, 1 << 29), (3 << 30, 1 << 30), (16 << 30, 4 << 30), (64 << 30, 16 << 30)]
)
def test_detect_leaves_room_for_the_rest(ram: int, reserve: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "usable_ram_bytes", lambda: ram)
    found = detect()
    assert (found.ram_bytes, found.reserve_bytes, found.default_budget) == (ram, reserve, ram - reserve)


def test_detect_measures_no_disk_and_sets_no_cache_limit() -> None:
    found = detect()
    assert found.threads >= 1
    assert found.disk_quota_bytes is None
    assert resolve({}, profile=settings(found)).origins["cache_limit"] == "default"


def test_an_installed_package_has_its_own_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "ondevice_trgl"
    (package / "_profiles").mkdir(parents=True)
    (package / "_profiles" / "my-board.toml").write_text(GOOD, encoding="utf-8")
    monkeypatch.setattr(profile, "__file__", str(package / "device" / "profile.py"))
    assert profile_names() == ["my-board"]
    assert load_profile("my-board").title == "A board"
