"""Device profiles: what a machine has, and the default budget that follows from it."""

import difflib
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ondevice_trgl.bounded import read_toml
from ondevice_trgl.device.host import cpu_count, usable_ram_bytes
from ondevice_trgl.errors import ConfigError, SizeError, UnknownNameError
from ondevice_trgl.units import parse_size

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """One machine. Sizes in bytes; None where it is not known."""

    name: str
    title: str
    ram_bytes: int
    reserve_bytes: int
    """Left to the rest of the system."""
    disk_read_bytes_per_second: int | None
    """Sequential."""
    disk_write_bytes_per_second: int | None
    disk_quota_bytes: int | None
    """Most that the activation cache may take."""
    flash_endurance_bytes: int | None = None
    """That its flash memory stands to be written in all (TBW), where a source says so."""
    threads: int
    device: str
    """cpu | cuda: where training runs on this machine."""
    sources: tuple[str, ...]
    """Where the figures come from."""

    @property
    def default_budget(self) -> int:
        """Bytes for a training process that is given no budget: RAM less the reserve."""
        return self.ram_bytes - self.reserve_bytes

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON-ready values."""
        return {**vars(self), "default_budget_bytes": self.default_budget, "sources": list(self.sources)}


def settings(profile: DeviceProfile) -> dict[str, Any]:
    """What a profile sets, for the `profile` argument of `config.resolve`."""
    return {"budget": profile.default_budget, "threads": profile.threads, "cache_limit": profile.disk_quota_bytes}


def detect() -> DeviceProfile:
    """This machine by its RAM (or its container's limit) and cores; disk and GPU are not looked at."""
    ram = usable_ram_bytes()
    # a quarter, at least 1 GiB, for the rest of the system; on the smallest machines half
    reserve = min(ram // 2, max(1 << 30, ram // 4))
    return DeviceProfile(
        name="this-machine",
        title="this machine, detected",
        ram_bytes=ram,
        reserve_bytes=reserve,
        disk_read_bytes_per_second=None,
        disk_write_bytes_per_second=None,
        disk_quota_bytes=None,
        threads=cpu_count(),
        device="cpu",
        sources=("the operating system of this machine",),
    )


def profile_names() -> list[str]:
    """Names of the profiles that come with the package, sorted."""
    return sorted(path.stem for path in _folder().glob("*.toml"))


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """A profile by name, or from a TOML file (anything that ends in .toml or names a folder).

    Raises UnknownNameError for a name that does not exist, ConfigError with every fault of a file.
    """
    path = Path(name_or_path)
    if path.suffix == ".toml" or len(path.parts) > 1:
        return _read(path)
    if str(name_or_path) not in profile_names():
        raise UnknownNameError(
            "profile",
            str(name_or_path),
            profile_names(),
            hint="a profile of your own is a TOML file: --profile my-board.toml",
        )
    return _read(_folder() / f"{name_or_path}.toml")


def _folder() -> Path:
    package = Path(__file__).resolve().parents[1]
    installed = package / "_profiles"
    return installed if installed.is_dir() else package.parent / "profiles"


def _size(value: Any) -> str | None:
    if not isinstance(value, str | int):
        return "expected a size like 600MB or 2GiB"
    try:
        parse_size(value)
    except SizeError as error:
        return error.hint if "not a byte size" in error.message else "must be more than zero bytes"
    return None


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "expected text"


def _threads(value: Any) -> str | None:
    good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    return None if good else "expected a whole number of at least 1"


def _device(value: Any) -> str | None:
    return None if value in DEVICES else f"expected {' | '.join(DEVICES)}"


def _sources(value: Any) -> str | None:
    good = isinstance(value, list) and value and all(isinstance(line, str) and line.strip() for line in value)
    return None if good else "expected a list of at least one text"


_KEYS: Mapping[str, Callable[[Any], str | None]] = {
    "title": _text,
    "ram": _size,
    "reserve": _size,
    "disk_read_per_second": _size,
    "disk_write_per_second": _size,
    "disk_quota": _size,
    "flash_endurance": _size,
    "threads": _threads,
    "device": _device,
    "sources": _sources,
}
_OPTIONAL = ("flash_endurance",)


def _read(path: Path) -> DeviceProfile:
    try:
        table = read_toml(path)
    except OSError as error:
        raise ConfigError(
            [f"cannot read {path}: {error.strerror}"], hint=f"names that need no file: {', '.join(profile_names())}"
        ) from None
    except ValueError as error:
        raise ConfigError([f"not valid TOML: {error}"], source=str(path)) from None
    faults = _faults(table)
    if faults:
        raise ConfigError(faults, source=str(path), hint=f"a profile has the keys {', '.join(_KEYS)}")
    return DeviceProfile(
        name=path.stem,
        title=table["title"],
        ram_bytes=parse_size(table["ram"]),
        reserve_bytes=parse_size(table["reserve"]),
        disk_read_bytes_per_second=parse_size(table["disk_read_per_second"]),
        disk_write_bytes_per_second=parse_size(table["disk_write_per_second"]),
        disk_quota_bytes=parse_size(table["disk_quota"]),
        flash_endurance_bytes=parse_size(table["flash_endurance"]) if "flash_endurance" in table else None,
        threads=table["threads"],
        device=table["device"],
        sources=tuple(table["sources"]),
    )


def _faults(table: Mapping[str, Any]) -> list[str]:
    faults = []
    for key in table:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            faults.append(f"{key}: no such key" + (f"; did you mean {near[0]!r}?" if near else ""))
    for key, check in _KEYS.items():
        if key not in table:
            faults += [f"{key}: missing"] * (key not in _OPTIONAL)
        elif reason := check(table[key]):
            faults.append(f"{key} = {reprlib.repr(table[key])}: {reason}")
    sizes_readable = all(key in table and _size(table[key]) is None for key in ("ram", "reserve"))
    if sizes_readable and parse_size(table["reserve"]) >= parse_size(table["ram"]):
        faults.append(f"reserve = {table['reserve']!r}: must be less than ram = {table['ram']!r}")
    return faults
