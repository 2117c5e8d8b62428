"""What decoding takes is known before: the kernel's peak of a process that decodes is never above, nor far below."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ondevice_trgl.data.decode import Fit, TooLargeError, decode_bytes, decode_within

Image = pytest.importorskip("PIL.Image")
SIZE = (2400, 1800)
SMALLER = {"ppm of 101 levels": (1400, 1050)}
"""Pillow decodes it in Python: 14 s at the size of the others."""
FIT = Fit(3, 64, 64)
_SCRIPT = """
import json, sys
from pathlib import Path
from ondevice_trgl.data.decode import Fit, decode
from ondevice_trgl.device.allocator import release_memory, tune

def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

assert "torch" not in sys.modules
tune("glibc")
taken = {}
for small, large in json.load(sys.stdin):
    decode(Path(small), Fit(3, 64, 64))
    release_memory()
    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    decode(Path(large), Fit(3, 64, 64))
    taken[large] = 1024 * (kib("VmHWM") - before)
print(json.dumps(taken))
"""
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "png": ("RGB", "png", {"compress_level": 1}),
    "png grey": ("L", "png", {"compress_level": 1}),
    "png palette": ("P", "png", {"compress_level": 1}),
    "png alpha": ("RGBA", "png", {"compress_level": 1}),
    "png 16 bits": ("I;16", "png", {"compress_level": 1}),
    "jpeg": ("RGB", "jpg", {}),
    "jpeg progressive": ("RGB", "jpg", {"progressive": True}),
    "jpeg progressive 4:4:4": ("RGB", "jpg", {"progressive": True, "subsampling": 0}),
    "jpeg progressive grey": ("L", "jpg", {"progressive": True}),
    "jpeg CMYK": ("CMYK", "jpg", {}),
    "webp": ("RGB", "webp", {"method": 0}),
    "webp lossless alpha": ("RGBA", "webp", {"method": 0, "lossless": True, "quality": 0}),
    "gif": ("P", "gif", {}),
    "bmp": ("RGB", "bmp", {}),
    "tiff": ("RGB", "tif", {}),
    "tiff CMYK": ("CMYK", "tif", {}),
    "tiff 32 bits": ("I", "tif", {}),
    "tiff float": ("F", "tif", {}),
    "tiff lzw": ("RGB", "tif", {"compression": "tiff_lzw"}),
    "tiff lzw in one strip": ("RGB", "tif", {"compression": "tiff_lzw", "strip_size": 1 << 30}),
    "tiff turned": ("RGB", "tif", {"tiffinfo": {274: 6}}),
    "ppm": ("RGB", "ppm", {}),
    "ppm of 101 levels": ("RGB", "ppm", {}),
}


def saved(path: Path, mode: str, size: tuple[int, int], options: dict[str, Any]) -> Path:
    noise = Image.effect_noise((size[0] // 8, size[1] // 8), 90).resize(size)
    if mode == "F":
        noise = noise.convert("F").point(lambda level: level / 255 + 0.0)
    elif mode in ("I", "I;16"):
        noise = noise.convert("I").point(lambda level: level * 257 + 0.0)
    (noise.convert("I;16") if mode == "I;16" else noise.convert(mode)).save(path, **options)
    if "101" in path.name:  # a decoder in Python reads it
        path.write_bytes(path.read_bytes().replace(b"255", b"100", 1))
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int]]:
    """Path and bytes taken of a picture of every kind, decoded one after another by one process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("no /proc/self/clear_refs: peak RSS cannot be reset here")
    folder = tmp_path_factory.mktemp("kinds")
    files = {}
    for name, (mode, suffix, options) in KINDS.items():
        stem = name.replace(" ", "-").replace(":", "")
        small = saved(folder / f"{stem}-small.{suffix}", mode, (64, 64), options)
        files[name] = (small, saved(folder / f"{stem}.{suffix}", mode, SMALLER.get(name, SIZE), options))
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        input=json.dumps([[str(path) for path in pair] for pair in files.values()]),
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
    )
    taken = json.loads(done.stdout)
    return {name: (large, taken[str(large)]) for name, (_, large) in files.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_decoding_takes_is_known_from_the_header(kind: str, measured: dict[str, tuple[Path, int]]) -> None:
    path, taken = measured[kind]
    foretold = decode_bytes(path, FIT)
    assert taken <= foretold
    assert foretold <= taken * 1.15 + 7_000_000


def test_what_takes_more_than_it_may_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "large.png", "RGB", SIZE, {"compress_level": 1})
    monkeypatch.setattr("ondevice_trgl.data.decode._fitted", _never)
    with pytest.raises(TooLargeError) as caught:
        decode_within(path, FIT, decode_bytes(path, FIT) - 1)
    assert (caught.value.size, caught.value.takes) == (SIZE, decode_bytes(path, FIT))
    assert caught.value.takes > 4 * SIZE[0] * SIZE[1], "Pillow takes four bytes a pixel of RGB"


def test_a_jpeg_is_decoded_small_and_one_in_several_scans_is_not(tmp_path: Path) -> None:
    baseline = saved(tmp_path / "baseline.jpg", "RGB", SIZE, {})
    progressive = saved(tmp_path / "progressive.jpg", "RGB", SIZE, {"progressive": True})
    assert decode_bytes(baseline, FIT) < decode_bytes(baseline, Fit(3, 900, 900)) / 2
    assert decode_bytes(baseline, FIT) < 3 * SIZE[0] * SIZE[1] <= decode_bytes(progressive, FIT)


def _never(*arguments: object) -> None:
    raise AssertionError("it was decoded")
