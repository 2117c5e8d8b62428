"""What the command's process sets before torch is imported: the C allocator, and how threads wait.

The allocator decides both the peak and the speed. Threads that spin while they wait for each other are fastest on an
idle machine and ten times slower beside an app that wants the cores too (16 s instead of 1.4 s for the default run,
3 s with a short spin), so they spin briefly.

Only the command line does this. A program that embeds the library keeps the allocator that it has.
"""

import os
import sys

from ondevice_trgl.cli.shell import Shell
from ondevice_trgl.device.allocator import allocator_name, tcmalloc_library, tune
from ondevice_trgl.errors import UsageError

_SPINS = "2000"  # of GNU OpenMP, before a waiting thread sleeps; its default is some 300 000
_STARTED_AGAIN = "TRGL_STARTED_WITH"


def prepare_process(shell: Shell, choice: str) -> None:
    """Bring about `choice`; may start the process again, from the beginning, with tcmalloc preloaded.

    Raises UsageError where tcmalloc is asked for and not to be had.
    """
    if not shell.own_process:
        return
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    if choice in ("auto", "tcmalloc") and allocator_name() != "tcmalloc":
        library = tcmalloc_library()
        preloaded = os.environ.get("LD_PRELOAD")
        if library is not None and _STARTED_AGAIN not in os.environ and (choice == "tcmalloc" or not preloaded):
            both = f"{library}:{preloaded}" if preloaded else str(library)
            os.execve(
                sys.executable,
                [sys.executable, *sys.orig_argv[1:]],
                {**os.environ, "LD_PRELOAD": both, _STARTED_AGAIN: "tcmalloc"},
            )
        if choice == "tcmalloc":
            raise UsageError(
                "tcmalloc cannot be preloaded here",
                hint="install it (on Debian and Ubuntu: apt install libtcmalloc-minimal4), or use --allocator auto",
            )
    tune(choice)
