"""Signals are the run's while it trains, and whoever's they were before afterwards."""

import dataclasses
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from ondevice_trgl.cli.signals import PauseOnSignal, Stopped
from ondevice_trgl.report.model import Report
from ondevice_trgl.run.callbacks import Callback
from tests.cli.conftest import Cli, Jobs, State

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def handlers_come_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_for_a_pause(
    number: signal.Signals, state: State, capfd: pytest.CaptureFixture[str]
) -> None:
    pauses: list[str] = []
    run = state(_pause=lambda: pauses.append("pause"))
    with PauseOnSignal() as signals:
        signals.on_fit_start(run)
        signals.on_step_end(run)
        assert pauses == []
        os.kill(os.getpid(), number)
        signals.on_step_end(run)
        assert pauses == ["pause"]
        assert signals.signum == number
        assert "once more to stop at once" in capfd.readouterr().err
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), number)
        assert stopped.value.signum == number


def test_before_and_after_training_a_signal_stops_at_once(state: State) -> None:
    with PauseOnSignal(), pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)
    with PauseOnSignal() as signals:
        signals.on_fit_start(state())
        signals.on_fit_end(state())
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)


def test_handlers_come_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="oh"), PauseOnSignal():
        raise ValueError("oh")


def test_a_thread_leaves_signals_alone() -> None:
    seen: list[object] = []

    def work() -> None:
        with PauseOnSignal():
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", [("train", "-b", "600MB"), ("resume", "r")])
def test_exit_code_after_a_checkpoint(
    cli: Cli, jobs: Jobs, report: Report, state: State, number: signal.Signals, code: int, command: tuple[str, ...]
) -> None:
    asked: list[bool] = []
    run = state(_pause=lambda: asked.append(True))

    def train(callbacks: tuple[Callback, ...]) -> None:
        for callback in callbacks:
            callback.on_fit_start(run)
        os.kill(os.getpid(), number)
        for callback in callbacks:
            callback.on_step_end(run)
            callback.on_pause(run)

    jobs.train = train
    jobs.report = dataclasses.replace(report, status="paused")
    result = cli(*command)
    assert result.code == code
    assert asked
    assert "trgl-device resume" in result.out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_code_before_training(cli: Cli, jobs: Jobs, number: signal.Signals, code: int) -> None:
    jobs.train = lambda callbacks: os.kill(os.getpid(), number)
    result = cli("train", "-b", "600MB", "--progress", "none")
    assert (result.code, result.out, result.err) == (code, "", "stopped\n")


def test_a_run_that_ends_in_spite_of_the_signal_is_done(cli: Cli, jobs: Jobs, state: State) -> None:
    def train(callbacks: tuple[Callback, ...]) -> None:
        callbacks[0].on_fit_start(state())
        os.kill(os.getpid(), signal.SIGINT)

    jobs.train = train
    assert cli("train", "-b", "600MB").code == 0
