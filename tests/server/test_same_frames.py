"""One prompt and one seed are one clip, whichever door it is asked for at."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from opensora.media.frames import ClipFile

pytestmark = [pytest.mark.slow, pytest.mark.multi]

PROMPT, SEED, STEPS = "a small red ball rolls left over the grass", 11, 2
PYTHON = f"""
import sys
import opensora
opensora.tune()
from opensora import ClipRequest, Engine
request = ClipRequest({PROMPT!r}, seed={SEED}, num_inference_steps={STEPS})
Engine.load(request).generate(request).save(sys.argv[1])
"""


def frames_of(path: Path) -> np.ndarray:
    clip = ClipFile(path)
    return np.stack(list(clip.frames(range(clip.num_frames()))))


@pytest.fixture
def environment() -> dict[str, str]:
    """Of all processes alike: the number of threads decides how sums are rounded."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.fixture
def server(tmp_path: Path, environment: dict[str, str]) -> Iterator[str]:
    """The URL of a server that runs."""
    command = [sys.executable, "-m", "opensora", "serve", "--folder", str(tmp_path / "server"), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr
    line = next(line for line in process.stderr if "listening at" in line)
    try:
        yield "http" + line.split("http")[1].split(";")[0]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()


def test_python_the_command_line_and_a_server_make_the_same_frames(
    tmp_path: Path, environment: dict[str, str], server: str
) -> None:
    by_python, by_command, by_server = (tmp_path / f"{name}.mkv" for name in ("python", "command", "server"))
    subprocess.run([sys.executable, "-c", PYTHON, by_python], check=True, env=environment)
    options = ["--seed", str(SEED), "--num-inference-steps", str(STEPS), "--output", by_command]
    subprocess.run([sys.executable, "-m", "opensora", "generate", PROMPT, *options], check=True, env=environment)
    body = {"prompt": PROMPT, "seed": SEED, "num_inference_steps": STEPS, "format": "mkv"}
    asked = urllib.request.Request(
        f"{server}/v1/videos", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    job = json.load(urllib.request.urlopen(asked))
    deadline = time.monotonic() + 300
    while job["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.2)
        job = json.load(urllib.request.urlopen(f"{server}/v1/videos/{job['id']}"))
    assert job["status"] == "completed", job
    by_server.write_bytes(urllib.request.urlopen(f"{server}/v1/videos/{job['id']}/content").read())
    frames = frames_of(by_command)
    assert len(frames) > 1
    assert np.array_equal(frames_of(by_python), frames)
    assert np.array_equal(frames_of(by_server), frames)
