"""The live display: three lines at the foot of the terminal, redrawn a few times a second by the hooks themselves.

Only the parts of rich that these lines need are imported, and no thread redraws them: the display is part of the
process whose memory is counted.
"""

import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ondevice_trgl.cli.progress import (
    SECONDS_BETWEEN_FRAMES,
    Progress,
    accuracies,
    losses,
    means,
    peak_of,
    phase,
    place,
)
from ondevice_trgl.run.callbacks import RunState


class LiveProgress(Progress):
    """Three lines that follow the run, and above them a line for each finished module."""

    def __init__(
        self, *, console: Console | None = None, no_color: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console or Console(stderr=True, no_color=no_color or None, highlight=False)
        self._live = Live(
            console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )
        self._clock = clock
        self._last: float | None = None

    def close(self) -> None:
        """Wipe the lines."""
        self._live.stop()

    def _draw(self, run: RunState) -> None:
        self._last = self._clock()
        self._live.start()
        self._live.update(frame(run), refresh=True)

    def _sometimes(self, run: RunState) -> None:
        if self._last is None or self._clock() - self._last >= SECONDS_BETWEEN_FRAMES:
            self._draw(run)

    on_step_end = on_cache_write = _sometimes
    on_module_start = on_epoch_start = on_epoch_end = on_wait = _draw

    def on_module_end(self, run: RunState) -> None:
        """Leave a line behind."""
        figures = [*accuracies(run), f"peak {peak_of(run)}"]
        self._console.print(
            Text.assemble((place(run), "bold"), "  ", "  ".join(figures)), no_wrap=True, overflow="ellipsis"
        )

    def on_fit_end(self, run: RunState) -> None:
        """Measuring baselines comes after: the lines would stand still."""
        self.close()
        self._console.print()

    def on_pause(self, run: RunState) -> None:
        """Where the run can be taken up again."""
        self.close()
        self._console.print(Text(f"paused; the checkpoint is in {run.run_dir}"))


def frame(run: RunState) -> Group:
    """The three lines: place and progress; losses and accuracies; memory, speed and time left."""
    head = Table.grid(padding=(0, 2, 0, 0))
    head.add_column(no_wrap=True)
    head.add_column(no_wrap=True)
    head.add_column(min_width=10, max_width=40, ratio=1)
    head.add_column(no_wrap=True, justify="right")
    head.add_row(
        Text(place(run), "bold", overflow="ellipsis"),
        Text(phase(run)),
        ProgressBar(total=max(run.steps, 1), completed=run.step, complete_style="cyan", finished_style="cyan"),
        Text(f"{run.step}/{run.steps}"),
    )
    over = run.peak_bytes is not None and run.peak_bytes > run.budget_bytes
    foot = Text(no_wrap=True, overflow="ellipsis")
    for i, part in enumerate(means(run)):
        foot.append("  " if i else "")
        foot.append(part, "bold red" if over and i == 0 else "")
    middle = f"waits: {run.waiting}" if run.waiting else "  ".join(losses(run))
    return Group(head, Text(middle, no_wrap=True, overflow="ellipsis"), foot)
