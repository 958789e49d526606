"""`opensora generate` under torchrun: one clip, one voice, one file."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_pipeline import make_pipeline

from opensora.cli.main import main
from opensora.media.read import read_video

PROMPT = "a small red ball rolls left"
OPTIONS = ["--model", "model", "--num-inference-steps", "3", "--seed", "3", "--num-videos", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    make_pipeline().save_pretrained(folder / "model")
    return folder


def torchrun(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*started, "-m", "opensora.cli.main", "generate", PROMPT, *OPTIONS, *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("how", [["--parallel-guidance"], []], ids=["guidance", "sequence"])
def test_two_processes_make_the_clips_of_one(folder, how, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    assert main(["generate", PROMPT, *OPTIONS, "--output", "alone.png"]) == 0
    capfd.readouterr()
    done = torchrun(folder, "--output", "shared.png", *how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["shared-0.png", "shared-1.png"]
    assert done.stderr.count("peak memory") == 1
    for number in range(2):
        alone, shared = (read_video(folder / f"{name}-{number}.png")[0].astype(int) for name in ("alone", "shared"))
        assert np.abs(alone - shared).max() <= 1
        assert json.loads((folder / f"shared-{number}.png.json").read_text())["seed"] == 3 + number


@pytest.mark.multi
@pytest.mark.slow
def test_a_mistake_is_told_once(folder):
    done = torchrun(folder, "--sequence-parallel", "3", "--output", "wrong.png")
    told = [line for line in done.stderr.splitlines() if line.startswith("opensora: ")]
    assert told == [
        "opensora: sequence parallelism over 3 takes 3 ranks, this run has 2; "
        "start as many with torchrun --nproc-per-node"
    ]
    assert done.returncode != 0 and not list(folder.glob("*wrong*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parallel-guidance"], "parallel guidance takes 2 or 3 ranks, this run has 1"),
        (["--sequence-parallel", "2"], "sequence parallelism over 2 takes 2 ranks, this run has 1"),
        (["--sequence-parallel", "0"], "sequence parallelism over 0"),
    ],
)
def test_without_torchrun(options, message, capsys):
    assert main(["generate", PROMPT, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
