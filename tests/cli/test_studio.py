"""`opensora studio`: the server with its page."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from opensora.cli.main import main


def test_without_gradio_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["studio", "--folder", str(tmp_path / "server")]) == 2
    assert capsys.readouterr().err == "opensora: the page needs gradio: pip install 'opensora[studio]'\n"
    assert not (tmp_path / "server").exists()


@pytest.mark.multi
def test_it_says_where_the_page_is_and_ends_in_order(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "opensora", "studio", "--no-browser", "--port", "0", "--folder", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        found = re.match(r"listening at (http://127\.0\.0\.1:\d+); Ctrl-C ends it", process.stderr.readline())
        assert found
        with urllib.request.urlopen(found[1], timeout=180) as answer:
            assert b"Open-Sora studio" in answer.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
