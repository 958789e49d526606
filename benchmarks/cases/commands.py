"""Commands as processes of their own, as a user would start them."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.comparison import Figures, Setting
from opensora.errors import OpenSoraError

PROMPT = "a small red ball rolls left over the grass"
SHORT = ("--num-frames", "1", "--num-inference-steps", "1")
"""Options of the shortest clip."""


def run_python(*args: str, threads: int | None = None) -> str:
    """Runs Python with these arguments and returns what it said on stderr.

    What else decides threads and memory is left to the command: of this process's environment it gets the rest.

    Raises:
        OpenSoraError: it failed.
    """
    settled = ("OMP_", "GLIBC_", "GOMP_", "KMP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(settled)}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise OpenSoraError(f"python {' '.join(args)} ended with {done.returncode}: {said[-1] if said else ''}")
    return done.stderr


def make_clip(setting: Setting, options: Sequence[str]) -> Figures:
    """The bundled model's clip from a cold start to the file; the seconds of sampling that the command reports."""
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "clip.mp4")
        command = ("-m", "opensora", "generate", PROMPT, "--device", "cpu", "--dtype", setting.dtype)
        said = run_python(*command, "--output", output, *options, threads=setting.threads)
    found = re.search(r"([\d.]+) s of it sampling", said)
    if found is None:
        raise OpenSoraError(f"generate reported no sampling time: {said.strip()}")
    return Figures({"s of it sampling": float(found[1])})
