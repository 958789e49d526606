"""What a busy neighbour costs: the bundled model's clip alone, and beside one busy process for each core.

Busy processes have sessions of their own, as other users' have, so the system shares the cores between them and the
clip. Not to be run beside other work.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.cases.commands import SHORT, make_clip
from benchmarks.comparison import Comparison, Figures, Run, Setting

SIZES = {"17 frames": (), "tiny": SHORT}
WAYS = {"tuned": (), "--no-tuning": ("--no-tuning",)}
BESIDE = ", beside a busy process a core"
BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


def comparisons(setting: Setting) -> Iterator[Comparison]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def way(count: int, options: tuple[str, ...]) -> Run:
        def run() -> Figures:
            with busy_processes(count):
                return make_clip(setting, options)

        return run

    ways: dict[str, Run] = {}
    for name, tuning in WAYS.items():
        options = (*tuning, *SIZES[setting.size])
        ways |= {name: way(0, options), name + BESIDE: way(cores, options)}
    yield Comparison("a clip of the bundled model", ways, [(name + BESIDE, name) for name in WAYS])


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute, and end when this one is killed."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()
