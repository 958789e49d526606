"""What a busy neighbour costs: `python benchmarks/neighbour.py [--rounds 3]`.

The bundled model's clip, from the command's start to the file, alone on the machine and beside one busy process for
each core, with the program's own tuning and with `--no-tuning`. Busy processes have sessions of their own, as other
users' have, so the system shares the cores between them and the clip. The four ways are run in turn; medians are
printed with the quickest and the slowest round. Do not run it beside other work.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROMPT = "a small red ball rolls left over the grass"
WAYS = {"tuned": (), "--no-tuning": ("--no-tuning",)}


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def seconds(folder: Path, *options: str) -> float:
    """Of one clip."""
    command = [sys.executable, "-m", "opensora", "generate", PROMPT, "--device", "cpu"]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GLIBC_", "GOMP_"))
    }
    started = time.perf_counter()
    subprocess.run([*command, "--output", str(folder / "clip.mp4"), *options], env=environment, check=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    found: dict[tuple[str, int], list[float]] = {(way, count): [] for way in WAYS for count in (0, cores)}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for way, count in found:
                with busy_processes(count):
                    found[way, count].append(seconds(Path(folder), *WAYS[way]))
    print("| | alone, s | beside a busy process a core, s | ratio |\n|---|---|---|---|")
    for way in WAYS:
        alone, beside = (found[way, count] for count in (0, cores))
        shown = (f"{statistics.median(one):.1f} ({min(one):.1f} to {max(one):.1f})" for one in (alone, beside))
        print(f"| {way} | {' | '.join(shown)} | {statistics.median(beside) / statistics.median(alone):.1f} |")


if __name__ == "__main__":
    main()
