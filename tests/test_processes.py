"""Asking another process: the answer, the errors and how it ended come across whole, whatever else it prints."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ondevice_trgl import processes
from ondevice_trgl.errors import (
    BudgetInfeasibleError,
    ConfigError,
    DamagedFileError,
    ProcessDiedError,
    TrglError,
    UnknownNameError,
)
from ondevice_trgl.processes import ask, why_not

ERRORS = [
    TrglError("it broke", hint="mend it"),
    ConfigError(["epochs: 0", "tau: größe"], source="run.toml", hint="see --help"),
    UnknownNameError("model", "resnet81", ["resnet18", "vgg16"], hint="or your own"),
    BudgetInfeasibleError("too small", budget_bytes=10, smallest_feasible_budget_bytes=2**40, hint="more"),
    DamagedFileError("torn"),
]
Answering = Callable[..., dict[str, Any]]


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answering:
    """Asks a child that does `work`, the body of a function of `request`; `before` stands at the top of its file."""
    here = str(Path(__file__).resolve().parents[1])
    monkeypatch.setenv("PYTHONPATH", f"{here}:{tmp_path}")

    def asked(work: str, request: dict[str, Any] | None = None, *, before: str = "", **start: Any) -> dict[str, Any]:
        body = "".join(f"    {line}\n" for line in work.splitlines())
        source = (
            "import os, subprocess, sys\nfrom ondevice_trgl.processes import answer\nfrom ondevice_trgl import errors\n"
            f"{before}\ndef work(request):\n{body}\nraise SystemExit(answer(work))\n"
        )
        (tmp_path / "a_child.py").write_text(source, encoding="utf-8")
        monkeypatch.setitem(processes.REQUESTS, "child", "a_child")
        return ask("child", request or {}, **start)

    return asked


def test_the_answer_comes_back_as_it_was_given(answering: Answering) -> None:
    request = {"text": 'größe "\n', "numbers": [1, 2.5, None, True], "deep": {"a": {"b": []}}}
    assert answering("return {'got': request}", request) == {"got": request}


@pytest.mark.parametrize("lean", [True, False])
def test_it_starts_as_it_is_told(answering: Answering, lean: bool) -> None:
    work = (
        "import gc\n"
        "kinds = [type(finder).__name__ for finder in sys.meta_path]\n"
        "given, home = os.environ.get('GIVEN'), 'HOME' in os.environ\n"
        "return {'collects': gc.isenabled(), 'lean': '_Watching' in kinds, 'given': given, 'home': home}"
    )
    before = {name: value for name, value in os.environ.items() if name != "HOME"}
    answer = answering(work, environment={**before, "GIVEN": "this"}, lean=lean)
    assert answer == {"collects": True, "lean": lean, "given": "this", "home": False}


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ProcessDiedError("gone", returncode=-signal.SIGKILL), "did_not_fit", "killed by the system"),
        (ProcessDiedError("gone", returncode=-signal.SIGINT), "failed", "interrupted"),
        (ProcessDiedError("status -11", returncode=-11), "failed", "status -11"),
        (TrglError("it broke", hint="mend it"), "failed", "it broke"),
    ],
)
def test_only_a_kill_is_a_want_of_memory(error: TrglError, status: str, words: str) -> None:
    assert why_not(error)[0] == status
    assert words in why_not(error)[1]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_comes_across_with_all_it_knows(answering: Answering, error: TrglError) -> None:
    rebuild = {
        TrglError: "errors.TrglError('it broke', hint='mend it')",
        ConfigError: "errors.ConfigError(['epochs: 0', 'tau: größe'], source='run.toml', hint='see --help')",
        UnknownNameError: "errors.UnknownNameError('model', 'resnet81', ['resnet18', 'vgg16'], hint='or your own')",
        BudgetInfeasibleError: "errors.BudgetInfeasibleError('too small', budget_bytes=10, "
        "smallest_feasible_budget_bytes=2**40, hint='more')",
        DamagedFileError: "errors.DamagedFileError('torn')",
    }
    with pytest.raises(TrglError) as caught:
        answering(f"raise {rebuild[type(error)]}")
    again = caught.value
    assert type(again) is type(error)
    assert (str(again), again.exit_code) == (str(error), error.exit_code)
    (note,) = again.__notes__  # where it was raised, for -v
    assert "a_child.py" in note
    own = {name: value for name, value in vars(again).items() if name != "__notes__"}
    assert own == json.loads(json.dumps(vars(error)))


def test_an_error_of_a_class_that_only_the_child_has_keeps_its_words(answering: Answering) -> None:
    with pytest.raises(TrglError, match="mine") as caught:
        answering("raise Mine('mine', hint='yours')", before="class Mine(errors.UsageError):\n    extra = object()")
    assert type(caught.value) is TrglError
    assert caught.value.hint == "yours"


NOISE = """\
import atexit
atexit.register(print, "goodbye")
os.write(1, b"at the top\\n")
print("at the top")
"""
MORE_NOISE = """\
print("hello")
os.write(1, b"\\xff\\xfe"); os.write(2, b"\\xff")
subprocess.run(["echo", "from below"], check=True)
print("x" * 1_000_000)
sys.stdout.write("left in the buffer")
os.write(1, b"{")
"""


@pytest.mark.parametrize(("before", "work"), [(NOISE, ""), ("", MORE_NOISE), ("", "print('{\"error\": 1}', end='')")])
def test_what_it_prints_beside_the_answer_does_no_harm(answering: Answering, before: str, work: str) -> None:
    assert answering(f"{work}\nreturn {{'a': 1}}", before=before) == {"a": 1}


@pytest.mark.parametrize(
    ("work", "code", "last_words"),
    [
        ("os._exit(3)", 3, "the process ended with status 3"),
        ("os._exit(0)", 0, "the process ended with status 0"),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, "the process ended with status -9"),
        ("raise ValueError('a bug')", 1, "ValueError: a bug"),
        ("os.write(2, b'noise\\n\\xff last\\n'); os._exit(7)", 7, "\N{REPLACEMENT CHARACTER} last"),
    ],
)
def test_a_child_that_dies_is_an_error_with_its_last_words(
    answering: Answering, work: str, code: int, last_words: str
) -> None:
    with pytest.raises(ProcessDiedError, match="the child process failed") as caught:
        answering(work)
    died = caught.value
    assert (died.returncode, died.message) == (code, f"the child process failed: {last_words}")
    assert ("memory" in died.hint) is (code == -signal.SIGKILL)
    assert ("Traceback" in died.__notes__[0]) is ("ValueError" in work)


def test_what_has_no_name_is_not_run() -> None:
    with pytest.raises(KeyError):
        ask("ondevice_trgl.baseline", {})


@pytest.mark.parametrize("module", sorted(processes.REQUESTS.values()))
def test_every_request_has_a_module(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


def test_what_is_told_on_the_way_comes_as_it_is_said_and_is_no_last_word(answering: Answering) -> None:
    lines: list[str] = []
    before = "from ondevice_trgl.processes import tell"
    work = "tell('half of größe')\nprint('noise', file=sys.stderr)\ntell('all')\nreturn {'done': True}"
    assert answering(work, before=before, told=lines.append) == {"done": True}
    assert lines == ["half of größe", "all"]
    work = "print('it broke', file=sys.stderr)\ntell('half')\nsys.stderr.flush()\nos._exit(3)"
    with pytest.raises(ProcessDiedError, match="the child process failed: it broke"):
        answering(work, before=before, told=lines.append)
    assert lines[2:] == ["half"]


def test_a_file_that_is_handed_on_can_be_written(answering: Answering, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        answering(f"os.write({file.fileno()}, b'written')\nreturn {{'done': 1}}", files=[file.fileno()])
    assert (tmp_path / "out").read_bytes() == b"written"


PARENT = """
import os, subprocess, sys
from ondevice_trgl.processes import CALLER
command = [sys.executable, "-m", "ondevice_trgl.device.lean", "http.server", "0", "--bind", "127.0.0.1"]
env = {**os.environ, CALLER: sys.argv[1] or str(os.getpid())}
with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as child:
    child.stdout.readline()
    print(child.pid, flush=True)
    child.wait()
    print("ended", child.returncode, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to end a process with another")
@pytest.mark.parametrize("caller", ["", "1"])
def test_a_process_ends_with_the_one_that_asked_it(caller: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, caller], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        said = parent.stdout.readline().split()
        if caller:  # another than its parent: that one is gone, and this is who takes in orphans
            assert parent.stdout.readline() == "ended 1\n"
            return
        child = psutil.Process(int(said[0]))
        parent.kill()
        psutil.wait_procs([child], timeout=60)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
