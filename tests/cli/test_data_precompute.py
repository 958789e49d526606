"""`opensora data precompute` in several processes, and killed again and again."""

import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from opensora.cli.main import main
from opensora.data.cache import INDEX, Cache
from opensora.manifest import ClipRow, write_manifest
from opensora.media.write import write_video

DATA = 'objective.data={"type": "ManifestClips", "buckets": {"64x64": {"17": [1.0, 1]}}, "manifest": "clips.csv"}'
NUM_CLIPS = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    rows = []
    for number in range(NUM_CLIPS):
        path = tmp_path / f"{number}.mp4"
        write_video(path, np.roll(video, number, axis=0), fps=8)
        rows.append(ClipRow(path, f"clip number {number}", 20, 64, 64, 8.0))
    write_manifest(tmp_path / "clips.csv", rows)
    return tmp_path


def command(*launcher: str, output: str) -> list[str]:
    args = ["-m", "opensora.cli.main", "data", "precompute", "v1_2_debug", DATA, "--output", output]
    return [sys.executable, *launcher, *args, "--shard-mb", "0.001", "--device", "cpu", "--workers", "1"]


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_settings_that_it_prints_train_on_the_cache(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["data", "precompute", "v1_2_debug", DATA, "--output", "cache", "--device", "cpu"]) == 0
    _, printed = capsys.readouterr().out.split("train on it with: ")
    settings = ["loop.steps=1", "loop.preview_every=0", "--output", "run", "--device", "cpu"]
    assert main(["train", "v1_2_debug", *shlex.split(printed), *settings]) == 0
    assert (folder / "run" / "model" / "model_index.json").exists()


@pytest.mark.slow
@pytest.mark.multi
def test_killed_at_random_moments_and_shared_by_processes_it_is_the_same_cache(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun's choice; sums of several threads may round otherwise
    started = time.monotonic()
    subprocess.run(command(output="whole"), check=True, capture_output=True)
    whole_s = time.monotonic() - started
    wanted = files(folder / "whole")
    assert Cache(folder / "whole").index.num_latents == NUM_CLIPS
    assert len([name for name in wanted if name.startswith("latents/")]) > 3

    rng = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen(command(output="killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(whole_s * rng.uniform(0.5, 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    subprocess.run(command(output="killed"), check=True, capture_output=True)
    found = files(folder / "killed")
    assert {name: found[name] for name in wanted} == wanted
    assert all(Path(name).name.startswith(".") for name in found.keys() - wanted.keys())

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    subprocess.run(command(*torchrun, output="shared"), check=True, capture_output=True, timeout=300)
    assert (folder / "shared" / INDEX).exists()
    assert files(folder / "shared") == wanted
