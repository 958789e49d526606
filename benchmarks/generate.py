"""Seconds from a cold start to a written clip: `python benchmarks/generate.py [--runs 5] [-- OPTIONS OF GENERATE]`.

Every run is a process of its own, one after the other. "whole" is the wall clock around the process; "sampling" is what
the command itself reports for the denoising loop and the decoding of pixels.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "a small red ball rolls left over the grass"


def run_once(options: list[str], output: Path) -> tuple[float, float]:
    """(whole, sampling) seconds of one process."""
    command = [sys.executable, "-m", "opensora.cli.main", "generate", PROMPT, "--output", str(output), *options]
    started = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True)
    whole = time.perf_counter() - started
    if result.returncode:
        sys.exit(result.stderr)
    found = re.search(r"([\d.]+) s of it sampling", result.stderr)
    if found is None:
        sys.exit(f"the command reported no sampling time: {result.stderr}")
    return whole, float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("options", nargs="*", help="options of generate, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = [run_once(args.options, Path(folder) / f"{i}.mp4") for i in range(args.runs)]
    for name, values in zip(("whole", "sampling"), zip(*times, strict=True), strict=True):
        each = ", ".join(f"{value:.1f}" for value in values)
        print(f"{name:8}  median {statistics.median(values):.2f} s  of {each}")


if __name__ == "__main__":
    main()
