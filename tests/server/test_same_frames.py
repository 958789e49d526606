"""One prompt and one seed are one clip, whichever door it is asked for at."""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from running_server import ENVIRONMENT, running_server

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


def clip_of(server: str) -> bytes:
    """The clip, asked for at a server."""
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
    return urllib.request.urlopen(f"{server}/v1/videos/{job['id']}/content").read()


def test_python_the_command_line_and_a_server_make_the_same_frames(tmp_path: Path) -> None:
    by_python, by_command, by_server = (tmp_path / f"{name}.mkv" for name in ("python", "command", "server"))
    subprocess.run([sys.executable, "-c", PYTHON, by_python], check=True, env=ENVIRONMENT)
    options = ["--seed", str(SEED), "--num-inference-steps", str(STEPS), "--output", by_command]
    subprocess.run([sys.executable, "-m", "opensora", "generate", PROMPT, *options], check=True, env=ENVIRONMENT)
    with running_server(tmp_path / "server") as server:
        by_server.write_bytes(clip_of(server))
    frames = frames_of(by_command)
    assert len(frames) > 1
    assert np.array_equal(frames_of(by_python), frames)
    assert np.array_equal(frames_of(by_server), frames)
