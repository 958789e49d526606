"""`opensora serve`, as a user starts it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
"""Of all processes alike: the number of threads decides how sums are rounded."""


@contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """The URL of a server that runs as long as the context lasts."""
    command = [sys.executable, "-m", "opensora", "serve", "--folder", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stderr
    line = next(line for line in process.stderr if "listening at" in line)
    try:
        yield "http" + line.split("http")[1].split(";")[0]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()
