"""Progress: what is known is shown, and a display never costs the run anything but lines."""

import io
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")

from rich.console import Console

from ondevice_trgl.cli.display import make_progress
from ondevice_trgl.cli.live import LiveProgress
from ondevice_trgl.cli.progress import PlainProgress, Progress
from ondevice_trgl.cli.shell import Shell
from tests.cli.conftest import State


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_line_an_epoch_and_a_module(state: State, clock: Clock) -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, clock=clock)
    progress.on_step_end(state())
    progress.on_epoch_end(state())
    progress.on_module_end(state(train_accuracy=0.93, val_accuracy=0.91, laps=2))
    assert stream.getvalue().splitlines() == [
        "module 2/5 layer2.0  epoch 3/5  task 1.2345  transport 0.0123  "
        "peak 402 MiB of 572 MiB  312 images/s  1m 20s left",
        "lap 1/2  module 2/5 layer2.0  done  task 1.2345  transport 0.0123  train 93.0%  val 91.0%  "
        "peak 402 MiB of 572 MiB  312 images/s  1m 20s left",
    ]


def test_what_is_not_known_is_not_shown(state: State, clock: Clock) -> None:
    stream = io.StringIO()
    unknown = dict.fromkeys(("task_loss", "transport_cost", "images_per_second", "peak_bytes", "seconds_left"))
    PlainProgress(stream, clock=clock).on_epoch_end(state(**unknown))
    assert stream.getvalue() == "module 2/5 layer2.0  epoch 3/5\n"


def test_long_epochs_give_a_line_every_few_seconds(state: State, clock: Clock) -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, clock=clock)
    for second in range(12):
        clock.now = float(second)
        progress.on_step_end(state(step=second))
    progress.on_cache_write(state(phase="cache"))
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[2] for line in lines] == ["5/120", "10/120"]
    clock.now = 20.0
    progress.on_cache_write(state(phase="cache"))
    assert "caching  57/120" in stream.getvalue()


def test_a_reader_that_left_does_not_end_the_training(state: State, clock: Clock) -> None:
    class Gone(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            raise BrokenPipeError

    stream = Gone()
    progress = PlainProgress(stream, clock=clock)
    progress.on_epoch_end(state())
    progress.on_epoch_end(state())
    assert stream.writes == 1


def live(clock: Clock, width: int) -> tuple[LiveProgress, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, highlight=False, color_system=None, _environ={})
    return LiveProgress(console=console, clock=clock), stream


@pytest.mark.parametrize("width", [40, 80, 200])
def test_live_shows_the_place_the_losses_and_the_means(state: State, clock: Clock, width: int) -> None:
    display, stream = live(clock, width)
    with display:
        display.on_step_end(state())
        shown = stream.getvalue()
    assert "module 2/5" in shown
    assert "task 1.2345  transport 0.0123" in shown
    if width >= 80:
        assert "layer2.0" in shown
        assert "epoch 3/5" in shown
        assert "57/120" in shown
        assert "peak 402 MiB of 572 MiB  312 images/s" in shown
    assert "None" not in shown


def test_live_draws_a_few_times_a_second(state: State, clock: Clock) -> None:
    display, stream = live(clock, 80)
    with display:
        for tick in range(101):
            clock.now = tick / 100
            display.on_step_end(state(step=tick))
        assert stream.getvalue().count("module 2/5") == 5  # at 0, 0.25, 0.5, 0.75 and 1 s


def test_live_leaves_a_line_a_module_and_the_cursor(state: State, clock: Clock) -> None:
    display, stream = live(clock, 80)
    with display:
        display.on_module_start(state())
        display.on_module_end(state(val_accuracy=0.5))
        display.on_fit_end(state())
        display.on_pause(state(run_dir=Path("runs/r")))
    text = stream.getvalue()
    assert "val 50.0%" in text
    assert "paused; the checkpoint is in runs/r" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


def test_live_over_budget_is_marked(state: State, clock: Clock) -> None:
    from ondevice_trgl.cli.live import frame

    for peak, marked in ((600_000_000, False), (600_000_001, True)):
        foot = frame(state(peak_bytes=peak)).renderables[-1]
        assert ("bold red" in str(getattr(foot, "spans", ""))) is marked


@pytest.mark.parametrize(
    ("mode", "quiet", "terminal", "term", "expected"),
    [
        ("auto", False, True, "xterm", LiveProgress),
        ("auto", False, True, "dumb", PlainProgress),
        ("auto", False, False, "xterm", PlainProgress),
        ("plain", False, True, "xterm", PlainProgress),
        ("none", False, True, "xterm", Progress),
        ("auto", True, True, "xterm", Progress),
    ],
)
def test_which_display(
    monkeypatch: pytest.MonkeyPatch, mode: str, quiet: bool, terminal: bool, term: str, expected: type[Progress]
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", term)
    assert type(make_progress(mode, Shell("trgl-device train", quiet=quiet))) is expected
