"""The environment that a process starts in: which C allocator is preloaded, and how threads wait.

Both can only be chosen where a process starts. `tuned_environment` is that of this package's own processes,
`plain_environment` that of a script which nobody tuned, to be measured against.
"""

from collections.abc import Mapping

from ondevice_trgl.device.allocator import allocator_name, tcmalloc_library
from ondevice_trgl.errors import UsageError

_SPINS = "2000"  # of GNU OpenMP, before a waiting thread sleeps; its default is some 300 000
_TUNING = ("LD_PRELOAD", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")


def tuned_environment(given: Mapping[str, str], choice: str) -> dict[str, str]:
    """`given` with what a process under the allocator `choice` (auto, tcmalloc, glibc, system) starts with.

    Threads that spin while they wait for each other are fastest on an idle machine and ten times slower beside an app
    that wants the cores too, so they spin briefly, unless `given` says otherwise.
    """
    environment = dict(given)
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _SPINS)
    library, preloaded = tcmalloc_library(), environment.get("LD_PRELOAD")
    wanted = choice == "tcmalloc" or (choice == "auto" and not preloaded)
    if wanted and library is not None and allocator_name() != "tcmalloc":
        environment["LD_PRELOAD"] = f"{library}:{preloaded}" if preloaded else str(library)
    return environment


def plain_environment(given: Mapping[str, str]) -> dict[str, str]:
    """`given` without anything that tunes the C allocator or preloads another: the defaults, untouched."""
    return {
        name: value
        for name, value in given.items()
        if name not in _TUNING and not name.startswith(("MALLOC_", "TCMALLOC_"))
    }


def no_tcmalloc() -> UsageError:
    """What is raised where tcmalloc is asked for and not to be had."""
    return UsageError(
        "tcmalloc cannot be preloaded here",
        hint="install it (on Debian and Ubuntu: apt install libtcmalloc-minimal4), or use --allocator auto",
    )
