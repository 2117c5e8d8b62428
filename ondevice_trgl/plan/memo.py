"""What was measured on this machine before, so that it need not be measured again.

One small JSON file a figure, in the user's cache folder. The key says everything that the figure depends on: layers and
shapes, batch, optimizer, device, threads, allocator, versions. Losing the folder costs seconds.
"""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ondevice_trgl.bounded import parse_object, read_bytes
from ondevice_trgl.device.allocator import allocator_name
from ondevice_trgl.device.host import cpu_model
from ondevice_trgl.model.alike import is_lasting
from ondevice_trgl.typed import value_of

_FORMAT = 1
_MOST_BYTES = 1 << 20


class Memo:
    """Figures by key. `folder` None keeps them for this process alone."""

    def __init__(self, folder: Path | None, **circumstances: Any) -> None:
        self._folder = folder
        self._circumstances = {"format": _FORMAT, **circumstances}
        self._known: dict[str, float] = {}

    def get(self, kind: str, alike: str, **key: Any) -> float | None:
        """The figure of `kind` for modules that are `alike`, or None."""
        name = self._name(kind, alike, key)
        if name not in self._known and self._folder is not None and is_lasting(alike):
            with contextlib.suppress(OSError, ValueError, KeyError):
                found = parse_object(read_bytes(self._folder / f"{name}.json", most=_MOST_BYTES))
                self._known[name] = value_of(float, found["value"])
        return self._known.get(name)

    def put(self, kind: str, alike: str, value: float, **key: Any) -> None:
        """Remember a figure. A folder that cannot be written is passed over: it saves time, no more."""
        name = self._name(kind, alike, key)
        self._known[name] = value
        if self._folder is None or not is_lasting(alike):
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            temporary = self._folder / f".{name}.{os.getpid()}"
            temporary.write_text(json.dumps({"value": value, "kind": kind, **key, **self._circumstances}), "utf-8")
            temporary.replace(self._folder / f"{name}.json")

    def _name(self, kind: str, alike: str, key: Mapping[str, Any]) -> str:
        text = json.dumps([kind, alike, sorted(key.items()), sorted(self._circumstances.items())], default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def circumstances(device: torch.device) -> dict[str, Any]:
    """What every figure depends on that is measured on `device` of this machine as it is now."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        **gpu,
        "code": _code_stamp(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "allocator": allocator_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cpu_model(),
    }


def _code_stamp() -> str:
    """Tells this state of the package's own files from any other, an edited one included."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    states = [(file.name, status.st_size, status.st_mtime_ns) for file in files for status in [file.stat()]]
    return hashlib.blake2b(repr(states).encode(), digest_size=8).hexdigest()


def memo_folder() -> Path:
    """`trgl-device/measured` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "trgl-device" / "measured"
