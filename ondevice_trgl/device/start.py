"""The environment that a process starts in: which C allocator is preloaded, and how threads wait.

`tuned_environment` is that of the processes of this package that train, `patient_environment` that of its short-lived
ones, `plain_environment` that of a script which nobody tuned, to be measured against.
"""

from collections.abc import Mapping

from ondevice_trgl.device.allocator import allocator_name, tcmalloc_library
from ondevice_trgl.errors import UsageError

_SPINS = "2000"  # of GNU OpenMP, before a waiting thread sleeps; its default is some 300 000
_GPU_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_TUNING = ("LD_PRELOAD", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")


def tuned_environment(given: Mapping[str, str], choice: str) -> dict[str, str]:
    """`given` with what a process under the allocator `choice` (auto, tcmalloc, glibc, system) starts with."""
    environment = dict(given)
    if not any(name in environment for name in _GPU_ALLOCATOR):
        environment[_GPU_ALLOCATOR[0]] = "expandable_segments:True"  # blocks of 2 MB that grow, in place of 20 MB ones
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")  # 8 MB for each thread; on an H100 it takes 32
    library, preloaded = tcmalloc_library(), environment.get("LD_PRELOAD")
    wanted = choice == "tcmalloc" or (choice == "auto" and not preloaded)
    if wanted and library is not None and allocator_name() != "tcmalloc":
        environment["LD_PRELOAD"] = f"{library}:{preloaded}" if preloaded else str(library)
    return environment


def patient_environment(given: Mapping[str, str]) -> dict[str, str]:
    """`given`, but that threads spin briefly while they wait for each other, unless it says otherwise.

    What trains looks at the load, see `Waiting`; a process of seconds does not, and beside an app it must not crawl.
    """
    environment = dict(given)
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", _SPINS)
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
