"""Open-Sora 2.0 by its published names: its row in the table, and files in the published layout, in miniature."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_two_encoders
import torch
from huggingface_hub import constants
from PIL import Image
from tiny_pipeline import seeded

from opensora.checkpoints.loading import load_pipeline
from opensora.checkpoints.published import PUBLISHED
from opensora.checkpoints.source import ModelSource
from opensora.cli.main import main as opensora
from opensora.media.read import read_video
from opensora.models.guidance_rules import TextImageGuidance

NAMES = tiny_two_encoders.NAMES
PROMPT = "a small red ball rolls left"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest, cache: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """The name of a model, all of whose files are there in miniature, and the networks they were written from."""
    entry = tiny_two_encoders.tiny(request.param)
    monkeypatch.setitem(PUBLISHED, request.param, entry)
    return request.param, tiny_two_encoders.write_published(cache, entry)


def run(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    code = opensora([str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


@pytest.mark.parametrize("name", NAMES)
def test_what_it_samples_with(name):
    defaults = PUBLISHED[name].defaults
    rule = TextImageGuidance(defaults["guidance_scale"], **defaults["guidance_options"])
    assert (rule.guidance_scale, rule.image_guidance_scale, rule.oscillating) == (7.5, 3.0, ("text", "image"))
    assert defaults["num_inference_steps"] == 50 and defaults["scores"] == {"fps": 24, "motion": 4}
    assert PUBLISHED[name].scheduler_config["transform"] == "tokens"


def test_made_of_its_files(model):
    name, networks = model
    pipe = load_pipeline(name, device="cpu")
    for part, network in networks.items():
        stored = getattr(pipe, part).state_dict()
        assert stored.keys() == network.state_dict().keys()
        for key, tensor in network.state_dict().items():
            torch.testing.assert_close(stored[key], tensor, atol=0.02, rtol=0.02)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(PROMPT, generator=seeded(1), output_type="pt")
    assert output.frames.shape == (1, pipe.config.num_frames, 3, 32, 48) and output.frames.isfinite().all()
    assert output.settings["spelled_prompt"] == [f"{PROMPT}. 24 FPS. 4 motion score."]
    # Where nothing is conditioned on, two of the three branches are the same, and not computed; all steps are steady.
    assert output.num_evaluations == 2 * 3


def test_known_frames_are_guided_by_three_branches(model):
    """Scales of text and image swing from the eleventh step on: 50 steps compute 110 of 150, without frames 80."""
    pipe = load_pipeline(model[0], device="cpu")
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {"generator": seeded(1), "output_type": "latent", "num_inference_steps": 50}
    from_image = pipe(PROMPT, image=picture, **options)
    plain = pipe(PROMPT, **options | {"generator": seeded(1)})
    assert (from_image.num_evaluations, plain.num_evaluations) == (110, 80)
    assert (from_image.frames - plain.frames).abs().max() > 1e-3


@pytest.mark.slow
def test_the_command_line_knows_it(model, capsys, tmp_path):
    """It is listed, planned, inspected, converted; clips are made by it, made again, and made by what was converted."""
    name, _ = model
    listed = {entry["name"]: entry for entry in json.loads(run(capsys, "models", "--json"))}
    assert listed[name]["where"] == "cache"
    described = run(capsys, "models", name)
    assert "CLIPTextModel" in described
    inspected = run(capsys, "inspect", name, "--quick")
    assert "MMDiT" in inspected and "text encoder 2" in inspected
    plan = json.loads(run(capsys, "plan", "--model", name, "--json"))
    assert {stage["network"] for stage in plan["stages"]} == {"transformer", "autoencoder", "text_encoder"}
    weights = ModelSource.find(name).parts["transformer"].path
    assert f"with the rest of {name}" in run(capsys, "plan", "--model", weights)

    clip, again, converted = (tmp_path / f"{which}.mkv" for which in ("clip", "again", "converted"))
    picture = tmp_path / "first.png"
    Image.fromarray(np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)).save(picture)
    wishes: list[Any] = ["--image", picture, "--image-guidance-scale", "2", "--motion-score", "7", "--device", "cpu"]
    wishes += ["--dtype", "float32"]
    run(capsys, "generate", PROMPT, "--model", name, *wishes, "--output", clip)
    record = json.loads((tmp_path / "clip.mkv.json").read_text())
    assert record["spelled_prompt"] == [f"{PROMPT}. 24 FPS. 7 motion score."]
    assert record["sampling"]["image_guidance_scale"] == 2
    run(capsys, "generate", "--from", clip, "--output", again)
    assert np.array_equal(read_video(clip)[0], read_video(again)[0])
    run(capsys, "convert", name, tmp_path / "folder", "--dtype", "float32")
    assert (tmp_path / "folder" / "text_encoder_2" / "config.json").is_file()
    folder = tmp_path / "folder"
    run(capsys, "generate", PROMPT, "--model", folder, *wishes, "--output", converted)
    assert np.array_equal(read_video(clip)[0], read_video(converted)[0])
