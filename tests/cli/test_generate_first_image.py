"""`opensora generate --text-to-image` with a tiny, untrained image pipeline of diffusers."""

import dataclasses
import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tiny_published import TEXT, write_tokenizer
from tiny_two_encoders import CLIP, write_clip_tokenizer
from tiny_v2_0 import make_pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from opensora.checkpoints import hub
from opensora.checkpoints.image_pipelines import IMAGE_MODELS
from opensora.cli.main import main
from opensora.generation.engine import Engine
from opensora.generation.first_images import image_size
from opensora.media.read import read_metadata, read_video

PROMPT = "a small red ball rolls left"


def write_image_pipeline(folder: Path) -> Path:
    """8 pixels a latent cell, pictures of 64 x 64."""
    torch.manual_seed(0)
    write_clip_tokenizer(folder / "words")
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=[4] * 4, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4, norm_num_groups=2,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP)),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "words", model_max_length=20),
        unet=UNet2DConditionModel(
            sample_size=8, block_out_channels=[8, 8], down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], cross_attention_dim=24, norm_num_groups=4,
            attention_head_dim=4, layers_per_block=1,
        ),
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "artist")  # fmt: skip
    return folder / "artist"


def write_flux(folder: Path) -> Path:
    """FLUX.1 in miniature: two text encoders, packed latents, guidance that the network is told."""
    torch.manual_seed(0)
    write_clip_tokenizer(folder / "words")
    write_tokenizer(folder / "pieces")
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKL(
            block_out_channels=[4] * 4, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4, norm_num_groups=2, shift_factor=0.1,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP)),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "words", model_max_length=20),
        text_encoder_2=T5EncoderModel(T5Config(**TEXT)),
        tokenizer_2=T5TokenizerFast.from_pretrained(folder / "pieces"),
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=TEXT["d_model"], pooled_projection_dim=CLIP["hidden_size"], guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
    ).save_pretrained(folder / "flux")  # fmt: skip
    return folder / "flux"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    write_image_pipeline(folder)
    make_pipeline(num_inference_steps=2).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch) -> Path:
    """With the models beside, and nothing made yet."""
    for name in ("artist", "model"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(*args: str, prompt: str | None = PROMPT) -> int:
    return main(["generate", *([] if prompt is None else [prompt]), "--model", "model", *args])


def test_the_picture_is_made_first_and_the_clip_begins_with_it(folder, capsys):
    options = ("--seed", "3", "--aspect-ratio", "2:1", "--resolution", "144p")
    assert generate("--text-to-image", "artist", *options, "--output", "clip.png") == 0
    said = capsys.readouterr()
    assert said.out.split() == ["clip.png"] and "first picture: clip.first.png" in said.err
    with Image.open("clip.first.png") as picture:
        drawn = np.asarray(picture)
    artist = StableDiffusionPipeline.from_pretrained("artist")
    expected = artist(PROMPT, height=48, width=96, generator=torch.Generator().manual_seed(3)).images[0]
    assert np.array_equal(drawn, np.asarray(expected))
    assert generate("--image", "clip.first.png", *options, "--output", "same.png") == 0
    assert np.array_equal(read_video("clip.png")[0], read_video("same.png")[0])
    assert "image_origin" not in read_metadata("same.png") or read_metadata("same.png")["image_origin"] is None


def test_the_record_tells_what_drew_it_and_makes_the_clip_again_without(folder):
    assert generate("--text-to-image", "artist", "--output", "clip.png") == 0
    origin = json.loads(Path("clip.png.json").read_text())["image_origin"]
    assert (origin["model"], origin["pipeline"]) == ("artist", "StableDiffusionPipeline")
    assert len(origin["sha256"]) == 64 and (origin["height"], origin["width"]) == (48, 80)
    (folder / "artist").unlink()
    assert generate("--from", "clip.png", "--output", "again.png", prompt=None) == 0
    assert np.array_equal(read_video("clip.png")[0], read_video("again.png")[0])
    assert read_metadata("again.png")["image_origin"] == origin


def test_every_clip_has_a_picture_of_its_own(folder):
    assert generate("--text-to-image", "artist", "--num-videos", "2", "--output", "clip.png") == 0
    first, second = (np.asarray(Image.open(f"clip-{number}.first.png")) for number in range(2))
    assert not np.array_equal(first, second)
    assert generate("--text-to-image", "artist", "--seed", "43", "--output", "alone.png") == 0
    assert np.array_equal(second, np.asarray(Image.open("alone.first.png")))


def test_the_artist_is_gone_before_the_clip_s_model_comes(folder, monkeypatch):
    alive = []
    load = Engine.load

    def look_around(*args, **options):
        gc.collect()
        alive.extend(thing for thing in gc.get_objects() if type(thing) is UNet2DConditionModel)
        return load(*args, **options)

    monkeypatch.setattr(Engine, "load", look_around)
    assert generate("--text-to-image", "artist", "--output", "clip.png") == 0
    assert alive == []


def test_a_repository_is_read_from_the_cache_and_fetched_on_request(folder, monkeypatch, capsys):
    assert generate("--text-to-image", "flux.1-dev", "--output", "clip.png") == 2
    assert "flux.1-dev is not on this machine; fetch it with --download" in capsys.readouterr().err
    fetched = []
    monkeypatch.setattr(hub, "snapshot", lambda repository, cache_dir=None: folder / "artist")
    monkeypatch.setattr(hub, "download_repository", lambda *args: fetched.append(args))
    assert generate("--text-to-image", "somebody/artist", "--output", "clip.png") == 0
    assert fetched == []
    assert json.loads(Path("clip.png.json").read_text())["image_origin"]["model"] == "somebody/artist"


def test_flux_draws_as_the_published_scripts_ask_it_to(folder, monkeypatch):
    flux = write_flux(folder)
    monkeypatch.setattr(hub, "snapshot", lambda repository, cache_dir=None: flux if "FLUX" in repository else None)
    monkeypatch.setitem(IMAGE_MODELS, "flux.1-dev", dataclasses.replace(IMAGE_MODELS["flux.1-dev"], side_px=64))
    assert generate("--text-to-image", "flux.1-dev", "--height", "16", "--width", "16", "--output", "clip.png") == 0
    origin = json.loads(Path("clip.png.json").read_text())["image_origin"]
    assert origin["model"] == "flux.1-dev" and origin["pipeline"] == "FluxPipeline"
    assert origin["options"] == {"num_inference_steps": 50, "guidance_scale": 4.0}
    artist = FluxPipeline.from_pretrained(flux)
    expected = artist(
        PROMPT, height=64, width=64, num_inference_steps=50, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(42),
    ).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(Image.open("clip.first.png")), np.asarray(expected))


def edited(folder: Path, **changes: object) -> None:
    """The artist with another index."""
    copy = folder / "other"
    shutil.copytree(folder / "artist", copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text-to-image", "nowhere"], "--text-to-image: nowhere does not exist"),
        (["--text-to-image", "flux1-dev"], "did you mean flux.1-dev?"),
        (["--text-to-image", "model"], "model is of the class OpenSoraPipeline, expected a text-to-image"),
        (["--text-to-image", "artist", "--image", "a.png"], "leave out --image"),
        (["--text-to-image", "artist", "--height", "15"], "height"),
    ],
)
def test_mistakes(folder, monkeypatch, capsys, options, message):
    monkeypatch.setattr(Engine, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    Image.new("RGB", (8, 8)).save("a.png")
    assert generate(*options, "--output", "clip.png") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said
    assert not list(folder.glob("clip*"))


def test_code_of_others_is_not_run(folder, capsys):
    edited(folder, unet=["somebodys_module", "UNet2DConditionModel"])
    assert generate("--text-to-image", "other", "--output", "clip.png") == 2
    assert "the unet of other is from 'somebodys_module'" in capsys.readouterr().err
    shutil.rmtree(folder / "other")
    edited(folder)
    weights = folder / "other/unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    assert generate("--text-to-image", "other", "--output", "clip.png") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "other cannot be opened" in said


def test_pictures_have_as_many_pixels_as_their_pipeline_is_used_for():
    class Pipe:
        vae_scale_factor, default_sample_size = 8, 128

    assert image_size((576, 1024), side_px=768, pipeline=Pipe()) == (576, 1024)
    assert image_size((100, 100), side_px=None, pipeline=Pipe()) == (1024, 1024)
    assert image_size((192, 336), side_px=None, pipeline=object()) == (384, 672)
