"""Three versions of OpenAI's client against `opensora serve`, which makes real clips for them."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server.api_server import picture

pytestmark = [pytest.mark.multi, pytest.mark.slow]

CLIENTS = Path(__file__).parents[2] / ".venv" / "openai"
TIMEOUT_S = 600


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a server listens, with a key."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "keys").write_text(f"ada:{'a' * 24}\n")
    command = [sys.executable, "-m", "opensora", "serve", "--folder", str(folder / "server"), "--port", "0"]
    paths = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [*command, "--key-file", str(folder / "keys")],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "listening" in line)
        yield re.search(r"http://[\w.:]+", said)[0]  # type: ignore[index]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        process.stderr.read()
        assert process.wait(TIMEOUT_S) == 128 + signal.SIGTERM


@pytest.mark.parametrize("version", ["2.8.1", "3.54.0", "newest"])
def test_openai_clients_do_all_they_can(url: str, version: str, tmp_path: Path) -> None:
    client = CLIENTS / version
    if not client.is_dir():
        pytest.skip("`make clients` fetches OpenAI's clients")
    (tmp_path / "first.png").write_bytes(picture())
    script = Path(__file__).with_name("openai_client.py")
    run = subprocess.run(
        [sys.executable, str(script), url, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(client)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert version in (seen["version"], "newest")
    assert seen["created"] == ["completed", 100, "2", "64x64", "toybox", None]
    assert seen["file"][0] > 1000 and seen["file"][1] == "video/mp4"
    assert min(seen["variants"]) > 100
    inputs, request = seen["given"]
    assert (inputs, request["seed"], request["num_inference_steps"]) == (["image"], 7, 1)
    assert (request["cfg_channels"], request["forecast"]["steps"]) == ([0, 1], "all")
    assert seen["given_status"] == "completed"
    assert seen["remix"] == [True, "a blue ball rolls left over the grass", "completed"]
    assert seen["listed"] == [True, True] and seen["deleted"] is True and seen["left"] == 0
    assert seen.get("made_of_it", ["completed", "completed"]) == ["completed", "completed"]
    assert ("made_of_it" in seen) == (version != "2.8.1")
    assert seen["errors"] == [
        ["NotFoundError", "not_found", None, True],
        ["BadRequestError", "invalid_request", "sed", True],
        ["BadRequestError", "invalid_request", "model", True],
        ["AuthenticationError", "invalid_api_key", None, True],
        ["ConflictError", "video_not_ready", None, True],
    ]
    assert seen["cancelled"] == ["failed", "cancelled"]
