"""`opensora train`: what it would do, mistakes in one line, a tiny run and how it goes on."""

import json
import shutil

import pytest
from PIL import Image

from opensora.cli.main import main
from opensora.media.read import read_video
from opensora.models.autoencoders.video import VideoAutoencoder

TINY = [
    "loop.steps=2",
    "loop.log_every=1",
    "loop.checkpoint_every=1",
    "loop.preview_every=0",
    "objective.num_clips=4",
    "objective.data.batch_size=1",
    "objective.frames_per_clip=1",
    "objective.data.clips.height=16",
    "objective.data.clips.width=16",
    "objective.data.clips.num_frames=5",
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["toybox_vae_frame"], ("unknown recipe", "toybox_vae_frames")),
        (["toybox_vae_frames", "loop.step=2"], ("loop.step", "steps")),
        (["toybox_vae_frames", "loop.steps=many"], ("loop.steps", "many")),
        (["toybox_vae_frames", "loop.precision=fp8"], ("loop.precision", "fp8", "bf16")),
        (["toybox_vae_frames", "steps"], ("steps", "=")),
        (["toybox_vae_frames", "--threads", "0"], ("--threads",)),
        (["toybox_vae_frames", "--threads", "1000"], ("--threads is 1000", "to 128")),
        (["toybox_vae_frames", "--device", "nonsense"], ("device 'nonsense' is not available", "cpu")),
        (["toybox_vae_latents"], ("toybox_vae_frames", "train the stage before")),
        (["toybox"], ("no autoencoder", "toybox_vae_pixels")),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(args, words, tmp_path, capsys):
    assert main(["train", *args]) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1, err
    assert all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


def test_a_run_and_how_it_goes_on(tmp_path, capsys):
    assert main(["train", "toybox-vae-frames", *TINY]) == 0  # dashes count as underscores
    folder = tmp_path / "runs" / "toybox_vae_frames"
    assert "model: runs/toybox_vae_frames/model" in capsys.readouterr().out
    assert {"model", "metrics.jsonl", "recipe.json", "checkpoints"} <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "recipe.json").read_text())["loop"]["steps"] == 2
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 2] and all(line["loss"] > 0 for line in logged)
    model = VideoAutoencoder.from_pretrained(folder / "model")
    assert model.latent_space.scaling_factor != 1

    # As a run looks that was killed in its second step.
    shutil.rmtree(folder / "checkpoints" / "step-00000002")
    before = (folder / "model" / "diffusion_pytorch_model.safetensors").read_bytes()
    shutil.rmtree(folder / "model")
    assert main(["train", "toybox_vae_frames", *TINY, "--dry-run"]) == 0
    assert "resumes from step-00000001" in capsys.readouterr().out
    assert main(["train", "toybox_vae_frames", *TINY]) == 0
    assert "resuming runs/toybox_vae_frames at step 1" in capsys.readouterr().out
    assert (folder / "model" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]

    assert main(["train", "toybox_vae_frames", *TINY, "objective.data.batch_size=2"]) == 2
    assert "other settings: objective.data.batch_size=2 (was 1)" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["v2_0_debug", "v2_0_dc_debug"])
def test_open_sora_2_in_miniature_goes_the_whole_way(recipe, tmp_path, capsys):
    """From the recipe to a clip that begins with a picture: two text encoders, known frames beside the noise."""
    few = ["loop.steps=2", "objective.data.num_clips=4", "objective.data.num_clips_of_other_lengths=2"]
    assert main(["train", recipe, *few, "--output", "run"]) == 0
    names = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert {"text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer"} <= names
    Image.new("RGB", (64, 64), "red").save("first.png")
    assert main(["generate", "a red ball", "--model", "run", "--image", "first.png", "--output", "clip.mp4"]) == 0
    frames, _ = read_video("clip.mp4")
    assert len(frames) == (16 if "dc" in recipe else 17)  # the picture is shown in its place, and no frame stands still
