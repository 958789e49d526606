"""How this process shares a machine: threads that sleep while they wait, no more than it may use, and large pages.

The threads of OpenMP spin while they wait for each other. Where another program wants the same core, each waits for one
that is not running, and small networks take forty times as long; asleep they take twice as long, as is fair. In a
container that may use two of sixty-four cores, sixty-four threads do the same to each other. And glibc gives large
blocks back to the system as they are freed, so the next tensor pays for every page of its memory again: pages of 2 MB
are fewer than those of 4 KB. Python, lastly, looks through everything that is imported for garbage, again and again,
where there is none.

None of it changes a bit of any result, but for the number of threads, which may change how sums are rounded.
"""

import contextlib
import ctypes
import gc
import os
import sys
import warnings
from collections.abc import MutableMapping
from pathlib import Path

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
"""What OpenMP of GNU, of LLVM and of Intel read when they are loaded."""
THREADS = "OMP_NUM_THREADS"
TUNABLES = "GLIBC_TUNABLES"
LARGE_PAGES = "glibc.malloc.hugetlb=1"

NEW_OBJECTS = 10_000
"""Between two searches for garbage; Python's own 700 takes a tenth of the time until a first clip."""

_M_MMAP_THRESHOLD = -3  # of malloc.h
_CGROUPS = Path("/sys/fs/cgroup")


def tune(environment: MutableMapping[str, str] = os.environ) -> None:
    """Has threads of this process, and of those it starts, sleep while they wait; the command line does it by itself.

    To be called before torch is imported, which is when OpenMP reads its settings; later a warning says that threads
    stay as they are. What the environment says already is left as it is.

    Args:
        environment: of the process.
    """
    if "torch" in sys.modules:
        warnings.warn(
            "torch is loaded already, so its threads keep spinning while they wait; call opensora.tune() before",
            stacklevel=2,
        )
    for name, value in WAITING.items():
        environment.setdefault(name, value)
    cores = allowed_cores()
    if cores is not None:
        environment.setdefault(THREADS, str(cores))


def use_large_pages() -> None:
    """Starts this program again with a C library that asks for them: glibc reads its settings when a process starts.

    Returns where it has been started so already, where a user has set them, and where the C library is another one.
    """
    if sys.platform != "linux" or not sys.executable or TUNABLES in os.environ:
        return
    with contextlib.suppress(ValueError, OSError):
        if os.confstr("CS_GNU_LIBC_VERSION"):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, TUNABLES: LARGE_PAGES})


def collect_less_often() -> None:
    """Has Python look for garbage once in `NEW_OBJECTS`; nearly all objects are those of modules, which never are."""
    gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])


def give_memory_back() -> None:
    """Has glibc give freed blocks of a megabyte or more back to the system at once, from now on in this process.

    By itself it learns from the blocks that are freed to keep those of up to 32 MB, which is quicker; between weights
    that come and go it then holds more that is free than is in use. Where the C library is another one, or a user has
    set its threshold, nothing is changed.
    """
    if sys.platform != "linux" or "mmap_threshold" in os.environ.get(TUNABLES, ""):
        return
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
        libc.malloc_trim(0)


def allowed_cores(cgroups: Path = _CGROUPS) -> int | None:
    """Cores that a container's quota allows, where that is fewer than there are; None where there is no such quota.

    Args:
        cgroups: where Linux tells of control groups, version 2 or 1.
    """
    old = cgroups / "cpu"
    quota = _quota(cgroups / "cpu.max") or _quota(old / "cpu.cfs_quota_us", old / "cpu.cfs_period_us")
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return None if quota is None or quota >= there else max(1, int(quota))


def _quota(*files: Path) -> float | None:
    """Microseconds of computing in a period, over those of the period: in one file or in two."""
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        time, period = " ".join(path.read_text() for path in files).split()
        share = float(time) / float(period)  # "max" is none
        return share if share > 0 else None  # neither is -1
    return None
