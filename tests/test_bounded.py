"""Files that somebody else made are read within bounds, or refused: quickly, and without a traceback."""

import math
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from ondevice_trgl.bounded import MOST_TOML_BYTES, fresh, opened, parse_json, parse_object, read_bytes, read_toml
from ondevice_trgl.config import TrainConfig
from ondevice_trgl.device.profile import load_profile
from ondevice_trgl.errors import ConfigError, SizeError
from ondevice_trgl.policy import parse_budget
from ondevice_trgl.units import parse_size


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Expecting value"),
        ("{", "Expecting"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        ('{"a": {"b": [{"c": 1, "c": 1}]}}', "'c' twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e999}', "1e999"),
        (f'{{"a": {10**4000}}}', "out of bounds"),
        (f'{{"a": {"9" * 6000}}}', "out of bounds"),
        (f'{{"a": {-(2**64)}}}', "out of bounds"),
        ("[" * 101, "100 deep"),
        ("[" * 1_000_000, "deep"),
        ('{"a":' * 200 + "1" + "}" * 200, "100 deep"),
        ("[" + "[]," * 600_000 + "1]", "values"),
        ('{"a": "\\u0000"}', "none"),
        ('{"\\ud800": 1}', "none"),
        ('[["\\ud83d"]]', "none"),
        ('{"a": 1} x', "Extra data"),
    ],
)
def test_json_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(text.encode())


def test_json_that_is_no_utf8_is_refused() -> None:
    for data in (b'{"a": "\xff"}', b"\xff\xfe{\x00}\x00", b'{"a": "\xed\xa0\x80"}'):
        with pytest.raises(ValueError, match=r"decode|utf"):
            parse_json(data)


def test_json_that_is_kept() -> None:
    text = '{"brackets": "[[[[{{{{ \\" ,,", "pair": "\\ud83d\\ude00", "name": "\\udcff", "n": [1, -2.5, true, null]}'
    assert parse_object(text.encode()) == {
        "brackets": '[[[[{{{{ " ,,',
        "pair": "\U0001f600",
        "name": "\udcff",
        "n": [1, -2.5, True, None],
    }
    assert parse_json(b"18446744073709551615") == 2**64 - 1
    assert parse_json(b"[Infinity, 1e999]", finite=False) == [math.inf, math.inf]
    with pytest.raises(ValueError, match="holds list, expected an object"):
        parse_object(b"[]")


def test_text_full_of_brackets_and_quotes_is_looked_through_in_no_time() -> None:
    began = time.perf_counter()
    for text in (b'"' + b"\\\\" * 1_000_000, b'"' * 1_000_001, b'["' + b"[" * 2_000_000 + b'"]', b"\\" * 2_000_000):
        try:
            parse_json(text)
        except ValueError:
            continue
    assert time.perf_counter() - began < 5.0


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("pipe", "no regular file"), ("link", "link"), (".", "folder"), ("gone", "No such file")):
        with pytest.raises(OSError, match=said):
            opened(tmp_path / name)
    with pytest.raises(OSError, match="no regular file"):
        opened(Path("/dev/zero"), follow=True)
    with pytest.raises(OSError, match="null"):
        opened(tmp_path / "a\0b")
    assert read_bytes(tmp_path / "link", follow=True) == read_bytes(tmp_path / "file") == b"x"


def test_a_file_larger_than_is_meant_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises(OSError, match="larger than 32768 KiB"):
            read_bytes(tmp_path / "large")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    (tmp_path / "small").write_bytes(b"123")
    assert read_bytes(tmp_path / "small", most=3) == b"123"
    with pytest.raises(OSError, match="larger"):
        read_bytes(tmp_path / "small", most=2)


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / ".x.tmp").symlink_to("mine")
    with fresh(tmp_path / ".x.tmp") as file:
        file.write(b"new")
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert not (tmp_path / ".x.tmp").is_symlink()


def a_file(text: str | bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


BAD_TOML: dict[str, Callable[[Path], None]] = {
    "not utf-8": a_file(b"\xff\xfe"),
    "nested": a_file("a = " + "[" * 50_000),
    "nested and closed": a_file("a = " + "[" * 20 + "]" * 20),
    "dotted": a_file(".".join("a" * 300) + " = 1"),
    "very dotted": a_file(".".join("a" * 100_000) + " = 1"),
    "huge": a_file("epochs = " + "9" * 5000),
    "huge hexadecimal": a_file("epochs = 0x" + "f" * 100_000),
    "large": a_file("#" * (MOST_TOML_BYTES + 1)),
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "absent": lambda path: None,
}


@pytest.mark.parametrize("name", BAD_TOML)
def test_toml_that_is_refused(tmp_path: Path, name: str) -> None:
    from ondevice_trgl.resolved import read_toml as read_config

    BAD_TOML[name](tmp_path / "bad.toml")
    began = time.perf_counter()
    for read in (read_config, load_profile):
        with pytest.raises(ConfigError, match=r"bad\.toml"):
            read(tmp_path / "bad.toml")
    with pytest.raises((OSError, ValueError)):
        read_toml(tmp_path / "bad.toml")
    assert time.perf_counter() - began < 10.0


@pytest.mark.parametrize("text", ["1" * 50 + "!", "1" * 10_000, "1.2.3MB", "ram " + " " * 10_000 + "x", "٣MB", "1e9"])
def test_sizes_are_refused_at_once(text: str) -> None:
    began = time.perf_counter()
    for parse in (parse_size, parse_budget):
        with pytest.raises(SizeError):
            parse(text)
    assert time.perf_counter() - began < 1.0


@pytest.mark.parametrize("value", [[], {}, "x" * 1_000_000, None, 1.5, True, -1, 2**63, [[[]]], {"a": None}, "²"])
@pytest.mark.parametrize("name", ["budget", "modules", "tau", "augment", "cache", "device", "checkpoint_every", "seed"])
def test_settings_of_any_type_are_kept_or_refused(name: str, value: object) -> None:
    said = ""
    try:
        TrainConfig(**{name: value})  # type: ignore[arg-type]
    except ConfigError as error:
        said = str(error)
    assert len(said) < 2000
