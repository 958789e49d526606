"""`opensora train` under torchrun: one voice, one mistake, a signal that saves, and a run that goes on."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opensora.distributed.checkpoint import newest_checkpoint

pytestmark = [pytest.mark.multi, pytest.mark.slow]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SETTINGS = [
    "loop.log_every=1",
    "loop.checkpoint_every=2",
    "loop.preview_every=0",
    "objective.num_clips=2",
    "objective.frames_per_clip=1",
    "objective.data.batch_size=1",
    "objective.data.clips.height=16",
    "objective.data.clips.width=16",
    "objective.data.clips.num_frames=5",
]


def command(folder: Path, *settings: str) -> list[str]:
    recipe = ["train", "toybox_vae_frames", *SETTINGS, *settings]
    return [*TORCHRUN, "-m", "opensora.cli.main", *recipe, "--output", str(folder), "--device", "cpu"]


def test_one_rank_speaks_for_all(tmp_path: Path) -> None:
    ended = subprocess.run(command(tmp_path / "run", "loop.steps=3"), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("model:") == 1
    assert (ended.stdout + ended.stderr).count("step 3 of 3") == 1
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    settings = ("loop.steps=3", "loop.sequence_parallel=3")
    wrong = subprocess.run(command(tmp_path / "wrong", *settings), capture_output=True, text=True, timeout=300)
    assert wrong.returncode != 0
    assert wrong.stderr.count("opensora: loop.sequence_parallel is 3 and the run has 2 ranks") == 1
    assert not (tmp_path / "wrong").exists()


def test_sigterm_saves_on_all_ranks(tmp_path: Path) -> None:
    run = subprocess.Popen(command(tmp_path, "loop.steps=100000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 2):
        assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    _, told = run.communicate(timeout=120)
    assert told.count(b"opensora: stopped after step") == 1, told
    path, damages = newest_checkpoint(tmp_path / "checkpoints")
    assert path is not None and not damages
    assert f"stopped after step {int(path.name.removeprefix('step-'))}".encode() in told
