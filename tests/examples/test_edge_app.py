"""The service of examples/edge_app: its requests, its errors, and that no way of ending it loses the training."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from examples.edge_app import training
from examples.edge_app.__main__ import main
from examples.edge_app.frames import Classifier, Foreground
from examples.edge_app.network import TEST, Digits, make_network
from examples.edge_app.training import BackgroundTrainer
from ondevice_trgl import ConfigError
from tests import asked_here

REPOSITORY = Path(__file__).resolve().parents[2]
LONG_SECONDS = 120.0
"""Nothing here takes as long, however busy the machine is."""
FRAME = json.dumps([0.0] * 64)


class Service:
    """A process of the app's, and a client of it."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "examples.edge_app", "--port", "0", "--state", "run", "--epochs", "2000", *flags],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:"), self.process.communicate()
        self._port = int(line.rsplit(":", 1)[1])

    def ask(self, method: str, path: str, body: str | bytes | None = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=LONG_SECONDS)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def until(self, wanted: Callable[[Any], bool]) -> Any:
        """The first status that is wanted."""
        deadline = time.monotonic() + LONG_SECONDS
        while time.monotonic() < deadline:
            _, status = self.ask("GET", "/status")
            if wanted(status):
                return status
            time.sleep(0.02)
        pytest.fail(f"it stays {status}")

    def end(self, number: signal.Signals) -> tuple[int, str, str]:
        """Exit status and what was printed, after a signal."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=LONG_SECONDS)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One that trains nothing, in a budget that nothing fits."""
    service = Service(tmp_path_factory.mktemp("idle"), "--budget", "20MB")
    yield service
    service.end(signal.SIGKILL)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("GET", "/nothing", None, 404, "/status"),
        ("POST", "/status", None, 405, "GET"),
        ("DELETE", "/budget", None, 405, "PUT"),
        ("FETCH", "/status", None, 501, "FETCH"),
        ("POST", "/pause", None, 409, "idle"),
        ("PUT", "/budget", "much", 400, "'much'"),
        ("PUT", "/budget", "", 400, "600MB"),
        ("PUT", "/budget", "-3", 400, "more than zero"),
        ("PUT", "/budget", b"\xff", 400, "UTF-8"),
        ("PUT", "/budget", "4" * 5000, 413, "4096"),
        ("POST", "/classify", "[1, 2]", 400, "64"),
        ("POST", "/classify", "frame", 400, "64"),
        ("POST", "/classify", json.dumps([300] * 64), 400, "255"),
    ],
)
def test_what_cannot_be_done_is_answered_with_why(
    idle: Service, method: str, path: str, body: str | bytes | None, status: int, words: str
) -> None:
    code, answer = idle.ask(method, path, body)
    assert code == status
    assert words in answer["message"] + answer.get("hint", "")
    assert answer["error"]


def test_a_refusal_says_which_budget_works(idle: Service) -> None:
    code, answer = idle.ask("POST", "/start")
    assert (code, answer["error"]) == (422, "BudgetInfeasibleError")
    assert answer["smallest_feasible_budget_bytes"] > 20_000_000
    assert idle.ask("GET", "/status")[1]["error"]["error"] == "BudgetInfeasibleError"


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Origin": "http://example.org"}, 403), ({"Content_Length": "x"}, 400), ({"Transfer_Encoding": "chunked"}, 411)],
)
def test_headers_that_are_refused(idle: Service, headers: dict[str, str], status: int) -> None:
    assert idle.ask("PUT", "/budget", **headers)[0] == status


def test_frames_are_looked_at_all_the_time(idle: Service) -> None:
    assert idle.ask("POST", "/classify", FRAME)[0] == 200
    seen = idle.ask("GET", "/status")[1]["frames"]["seen"]
    idle.until(lambda status: status["frames"]["seen"] > seen)


@pytest.mark.parametrize(("flags", "words"), [(("--budget", "much"), "'much'"), (("--port", "99999"), "port")])
def test_what_is_wrong_at_the_start_ends_it_with_2(
    tmp_path: Path, flags: tuple[str, str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--state", str(tmp_path / "run"), *flags]) == 2
    said = capsys.readouterr()
    assert (said.out, words in said.err) == ("", True)
    assert list(tmp_path.iterdir()) == []


def test_a_training_survives_pauses_a_kill_and_a_stop(tmp_path: Path) -> None:
    flags = ("--burst", "2", "--burst-seconds", "2")
    service = Service(tmp_path, *flags)
    try:
        code, status = service.ask("POST", "/start")
        assert (code, status["state"]) == (202, "training")
        assert service.ask("POST", "/start")[0] == 409
        assert service.ask("PUT", "/budget", "390MB")[0] == 200
        service.until(lambda s: s["progress"]["budget_bytes"] == 390_000_000 and s["progress"]["epoch"] >= 2)

        # a budget that cannot be held ends the training, not the app, and a larger one goes on with it
        assert service.ask("PUT", "/budget", "60000000")[0] == 200
        failed = service.until(lambda s: s["state"] == "failed")
        assert failed["error"]["error"] == "BudgetExceededError"
        assert service.ask("PUT", "/budget", '"400MB"')[0] == 200
        assert service.ask("POST", "/start")[1]["state"] == "training"

        service.until(lambda s: s["progress"]["phase"] == "train" and s["progress"]["epoch"] >= 3)
        code, paused = service.ask("POST", "/pause")
        assert (code, paused["state"], paused["error"]) == (200, "paused", None)
        assert 0 < paused["peak_bytes"] <= 400_000_000
        assert service.ask("POST", "/pause")[0] == 409
        assert service.ask("POST", "/start")[1]["state"] == "training"
    finally:
        assert service.end(signal.SIGKILL)[0] == -signal.SIGKILL

    service = Service(tmp_path, *flags)
    try:
        assert service.ask("GET", "/status")[1]["state"] == "paused"
        assert service.ask("POST", "/start")[1]["state"] == "training"
        resumed = service.until(lambda s: s["progress"]["phase"] == "train")
        assert resumed["progress"]["epoch"] >= paused["progress"]["epoch"]

        # clients that ask much have the machine to themselves
        def busy(status: Any) -> bool:
            assert service.ask("POST", "/classify", FRAME)[0] == 200
            return bool(status["state"] == "yielding")

        service.until(busy)
        service.until(lambda s: s["state"] == "training")
    finally:
        service.process.send_signal(signal.SIGTERM)  # `timeout` and others send it twice
        code, out, err = service.end(signal.SIGTERM)
    assert (code, out, err) == (0, "stopped, the run is paused\n", "")
    assert json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))["status"] == "paused"


def test_the_foreground_is_busy_for_a_while_after_a_burst() -> None:
    now = [0.0]
    foreground = Foreground(3, 2.0, clock=lambda: now[0])
    for now[0] in (0.0, 0.5):
        foreground.request()
        assert foreground.seconds_left() == 0.0
    now[0] = 1.0
    foreground.request()
    assert foreground.seconds_left() == 1.0
    now[0] = 2.1
    assert foreground.seconds_left() == 0.0
    foreground.request()  # the third within two seconds again
    assert foreground.seconds_left() == pytest.approx(0.4)


@pytest.mark.long
@pytest.mark.usefixtures("code_pages_kept")
def test_what_was_trained_is_used_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "Trainer", asked_here.Trainer)
    settings = {"epochs": 2, "classifier_epochs": 1, "modules": 2, "threads": 1, "enforce": False}
    right: list[int] = []
    for _ in range(2):  # the second finds a run that is completed
        classifier = Classifier(make_network())
        trainer = BackgroundTrainer(tmp_path / "run", "2GB", settings, classifier, Foreground(9, 1.0))
        assert trainer.status()["state"] == ("completed" if right else "idle")
        trainer.start()
        trainer.wait()
        status = trainer.status()
        assert (status["state"], status["error"]) == ("completed", None)
        frames = Digits(TEST)
        right.append(sum(classifier.classify(frames[index][0]) == frames[index][1] for index in range(len(frames))))
        assert status["test_accuracy"] == pytest.approx(right[-1] / len(frames))
    assert right[0] == right[1] > 0.5 * len(frames)  # chance is 0.1
    with pytest.raises(ConfigError, match="'much'"):
        trainer.set_budget("much")
