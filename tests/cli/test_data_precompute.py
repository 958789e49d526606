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


def test_a_table_of_the_user_is_not_written_over(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    mine = "path,text,num_frames,height,width,fps,source\n0.mp4,a clip,20,64,64,8,the web\n"
    (folder / "manifest.csv").write_text(mine)
    data = DATA.replace("clips.csv", "manifest.csv")
    assert main(["data", "precompute", "v1_2_debug", data, "--output", ".", "--device", "cpu"]) == 2
    assert "holds a manifest.csv that is not of a cache" in capsys.readouterr().err
    assert (folder / "manifest.csv").read_text() == mine


def test_clips_that_could_not_be_read_are_tried_again(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    args = ["data", "precompute", "v1_2_debug", DATA, "--output", "cache", "--device", "cpu"]
    for name in folder.glob("*.mp4"):
        name.rename(name.with_suffix(".away"))
    assert main(args) == 2
    assert "no clip could be read; the first one: " in capsys.readouterr().err
    for name in folder.glob("*.away"):
        name.rename(name.with_suffix(".mp4"))
    assert main(args) == 0
    assert Cache(folder / "cache").index.num_latents == NUM_CLIPS


def test_a_recipe_that_has_no_clips_of_a_manifest_is_told(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["data", "precompute", "v1_2_debug", "--manifest", "clips.csv", "--output", "cache"]) == 2
    assert "trains on ToyboxLatents, not on the clips of a manifest" in capsys.readouterr().err


def test_words_that_the_model_does_not_know_are_told_before_the_work(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for command in (["train", "toybox_lora", "--output", "run", "objective.data.manifest=clips.csv"],
                    ["data", "precompute", "toybox_lora", "--output", "cache", "--manifest", "clips.csv"]):  # fmt: skip
        assert main(command) == 2
        assert "this model does not know: number, 0, 1" in capsys.readouterr().err
    assert not (folder / "run").exists()


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
