"""Heat and charge, as a device's /sys tells them; a made-up one here."""

from pathlib import Path

import pytest

from ondevice_trgl.device.sensors import battery_percent, celsius


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n", encoding="ascii")


def zones(sys: Path, *temperatures: str) -> None:
    for number, text in enumerate(temperatures):
        write(sys / "class" / "thermal" / f"thermal_zone{number}", temp=text)


@pytest.mark.parametrize(
    ("temperatures", "expected"),
    [
        (["45000", "61500", "38000"], 61.5),
        (["45000", "-274000", "0", "200000"], 45.0),  # not connected
        (["what", "50000"], 50.0),
        (["what"], None),
        ([], None),
    ],
)
def test_the_hottest_zone_counts(tmp_path: Path, temperatures: list[str], expected: float | None) -> None:
    zones(tmp_path, *temperatures)
    (tmp_path / "class" / "thermal" / "thermal_zone9").mkdir(parents=True)  # has no file
    assert celsius(tmp_path) == expected


def test_the_emptiest_battery_that_the_machine_runs_on_counts(tmp_path: Path) -> None:
    supplies = tmp_path / "class" / "power_supply"
    assert battery_percent(tmp_path) is None
    write(supplies / "AC", type="Mains", online="0")
    assert battery_percent(tmp_path) is None
    write(supplies / "mouse", type="Battery", scope="Device", capacity="3", status="Discharging")
    assert battery_percent(tmp_path) is None
    write(supplies / "BAT0", type="Battery", capacity="80", status="Discharging")
    write(supplies / "BAT1", type="Battery", capacity="35", status="Discharging")
    assert battery_percent(tmp_path) == 35.0
    for status in ("Charging", "Full", "Not charging"):
        (supplies / "BAT1" / "status").write_text(status)
        assert battery_percent(tmp_path) == 80.0
    (supplies / "BAT0" / "capacity").write_text("?")
    assert battery_percent(tmp_path) == 100.0
