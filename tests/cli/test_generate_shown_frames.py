"""Condition types of Open-Sora 2.0 on the command line, with tiny, untrained models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import make_pipeline as make_flow
from tiny_v2_0 import make_autoencoder, make_pipeline

from opensora import load_pipeline
from opensora.cli.main import main
from opensora.conditioning.frames import condition
from opensora.geometry import VideoSize
from opensora.media.read import read_metadata, read_video
from opensora.media.transforms import to_video
from opensora.media.write import write_video

PROMPT = "a small red ball rolls left"


def frames_of(num_frames: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, 16, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shown")
    for kind in ("hunyuan", "dc-ae"):
        make_pipeline(make_autoencoder(kind), num_inference_steps=2).save_pretrained(folder / kind)
    make_flow().save_pretrained(folder / "flow")
    Image.fromarray(frames_of(1, 0)[0]).save(folder / "picture.png")
    write_video(folder / "clip.png", frames_of(40, 1), 8)
    return folder


@pytest.fixture
def generate(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)

    def run(model: str, *args: str, prompt: str = PROMPT, output: str = "out.png") -> np.ndarray | None:
        prompts = [] if "--from" in args else [prompt]
        path = tmp_path / output
        code = main(["generate", *prompts, "--model", model, *args, "--output", str(path)])
        return read_video(path)[0] if code == 0 else None

    return run


def test_a_condition_is_the_pipeline_s(generate, folder, tmp_path):
    """And is made again from its record."""
    frames = generate(
        "hunyuan", "--cond-type", "v2v_tail", "--reference-path", "clip.png", "--num-frames", "49", "--seed", "0"
    )
    pipe = load_pipeline(folder / "hunyuan", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    size = VideoSize(49, 16, 24)
    clip = to_video(frames_of(40, 1))
    given = condition(pipe.autoencoder, size, extend=clip[:, -33:], backwards=True, condition_frames=9, alone=True)
    made = pipe(
        PROMPT, conditioning=given, num_frames=49, generator=torch.Generator().manual_seed(0), output_type="np"
    ).frames[0]
    np.testing.assert_allclose(frames, made * 255, atol=1.001)
    again = generate("hunyuan", "--from", str(tmp_path / "out.png"), output="again.png")
    assert np.array_equal(again, frames)
    assert read_metadata(tmp_path / "out.png")["given"]["mask_strategy"] == "0,0,-9,-9,9,0.0"


def test_seed_0_is_a_seed(generate):
    first, again, other = (generate("hunyuan", "--seed", seed) for seed in ("0", "0", "42"))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_frames_that_repeat_a_picture_are_left_out(generate, capsys):
    frames = generate("dc-ae", "--cond-type", "i2v_loop", "--reference-path", "picture.png", "--num-frames", "16")
    assert len(frames) == 10
    assert "10 frames of 16x24" in capsys.readouterr().err
    assert len(generate("dc-ae", "--image", "picture.png", "--num-frames", "16", "--loop", "2")) == 13 + 8


def test_a_former_name_is_told(generate, capsys):
    options = ("--reference-path", "clip.png", "--num-frames", "49", "--cond-type")
    frames = generate("hunyuan", *options, "v2v_head_half")
    assert "note: v2v_head_half is called v2v_head_easy by the code of 2.0" in capsys.readouterr().err
    assert np.array_equal(frames, generate("hunyuan", *options, "v2v_head_easy"))


def test_what_other_models_do_not_know(generate, capsys):
    assert generate("flow", "--cond-type", "v2v_tail", "--reference-path", "clip.png") is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "v2v_tail is a condition type of Open-Sora 2.0; this model knows v2v_head" in said
