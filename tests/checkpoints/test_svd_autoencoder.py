"""Stable Video Diffusion's autoencoder in the place of a model's own, from the folder that diffusers saves."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_published
import torch
from diffusers import AutoencoderKLTemporalDecoder
from huggingface_hub import constants
from tiny_pipeline import seeded

from opensora.checkpoints import hub
from opensora.checkpoints.components import load_component
from opensora.checkpoints.loading import load_pipeline
from opensora.checkpoints.published import PUBLISHED
from opensora.checkpoints.published_parts import SVD_AUTOENCODER
from opensora.cli.main import main
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.video import VideoAutoencoder

NAME = "opensora-1.0-hq-16x256x256"
FACTOR = 0.18215
# diffusers' decoder has 32 groups in every norm.
OPTIONS: dict[str, Any] = {
    "block_out_channels": [32, 32, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 1,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def original(**options: Any) -> AutoencoderKLTemporalDecoder:
    torch.manual_seed(0)
    model = AutoencoderKLTemporalDecoder(**{**OPTIONS, **options})
    with torch.no_grad():  # layers over time count
        for name, parameter in model.named_parameters():
            if name.endswith("mix_factor"):
                parameter.fill_(0.7)
    return model.eval()


@pytest.fixture
def folder(tmp_path) -> Path:
    original().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def released(tmp_path, monkeypatch) -> None:
    """A small Open-Sora 1.0 in the cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(PUBLISHED, NAME, tiny_published.tiny(NAME))
    tiny_published.write_published(tmp_path / "cache", PUBLISHED[NAME])


@torch.no_grad()
def assert_decodes_as(autoencoder: VideoAutoencoder, reference: AutoencoderKLTemporalDecoder) -> None:
    latents = torch.randn(1, 4, 3, 2, 3, generator=torch.Generator().manual_seed(1))
    frames = reference.decode(latents[0].transpose(0, 1) / FACTOR, num_frames=3).sample
    torch.testing.assert_close(
        autoencoder.decode_latents(latents, 3), frames.transpose(0, 1)[None], atol=2e-5, rtol=1e-4
    )


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_its_folder_loads(folder):
    autoencoder = load_component(folder, VideoAutoencoder)
    assert_decodes_as(autoencoder, original())
    assert (autoencoder.micro_frame_size, autoencoder.temporal_factor, autoencoder.spatial_factor) == (None, 1, 8)
    assert autoencoder.latent_space.scaling_factor == FACTOR


def test_half_precision_under_the_name_of_a_variant(tmp_path):
    original().half().save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert_decodes_as(load_component(tmp_path, VideoAutoencoder), original().half().float())


def test_it_declares_its_own_factor(tmp_path):
    original(scaling_factor=0.25).save_pretrained(tmp_path)
    assert load_component(tmp_path, VideoAutoencoder).latent_space.scaling_factor == 0.25
    config = {"_class_name": "AutoencoderKLTemporalDecoder", **OPTIONS, "norm_num_groups": 32}
    tiny_published.write_json(tmp_path / "config.json", config)
    with pytest.raises(OpenSoraError, match="unknown option norm_num_groups"):
        load_component(tmp_path, VideoAutoencoder)


@pytest.mark.usefixtures("released")
def test_a_release_makes_frames_with_it(folder, tmp_path):
    """From the folder, from its weights alone, and in our own layout."""
    own = load_pipeline(NAME)
    (tmp_path / "alone").mkdir()
    shutil.copy(folder / WEIGHTS, tmp_path / "alone")
    load_component(folder, VideoAutoencoder).save_pretrained(tmp_path / "ours")
    saved = load_pipeline(NAME)
    saved.save_pretrained(tmp_path / "pipeline")
    for model in (NAME, tmp_path / "pipeline"):
        for path in (folder, folder / WEIGHTS, tmp_path / "alone", tmp_path / "ours"):
            autoencoder = load_pipeline(model, components={"autoencoder": path}).autoencoder
            assert_decodes_as(autoencoder, original())
            assert autoencoder.latent_space.differences(own.autoencoder.latent_space) == {}
    pipe = load_pipeline(NAME, components={"autoencoder": folder})
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a small red ball rolls left", generator=seeded(3), output_type="pt").frames.shape == (1, 4, 3, 32, 48)


@pytest.mark.usefixtures("released")
def test_the_autoencoder_frame_by_frame_can_take_its_place_again(folder, tmp_path):
    pipe = load_pipeline(NAME, components={"autoencoder": folder})
    pipe.save_pretrained(tmp_path / "pipeline")
    published = tiny_published.snapshot(tmp_path / "cache", PUBLISHED[NAME].autoencoder)
    back = load_pipeline(tmp_path / "pipeline", components={"autoencoder": published}).autoencoder
    assert same_weights(back, load_pipeline(NAME).autoencoder)


@pytest.mark.usefixtures("released")
def test_convert_writes_it_as_ours(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    converted = load_component(tmp_path / "out", VideoAutoencoder)
    assert same_weights(converted, load_component(folder, VideoAutoencoder))
    assert_decodes_as(converted, original())
    # Weights alone, and a whole model.
    assert main(["convert", str(folder / WEIGHTS), str(tmp_path / "alone"), "--model", "opensora-1.0"]) == 0
    assert_decodes_as(load_component(tmp_path / "alone", VideoAutoencoder), original())
    whole = tmp_path / "whole"
    assert main(["convert", NAME, str(whole), "--autoencoder", str(folder)]) == 0
    assert_decodes_as(load_pipeline(whole).autoencoder, original())
    capsys.readouterr()
    assert main(["convert", str(folder / WEIGHTS), str(tmp_path / "no")]) == 2
    assert "shapes do not tell scaling_factor" in capsys.readouterr().err


def test_inspect_names_it(folder, tmp_path, capsys):
    assert main(["inspect", str(folder)]) == 0
    told = capsys.readouterr().out
    load_component(folder, VideoAutoencoder).save_pretrained(tmp_path / "ours")
    for path in (folder / WEIGHTS, tmp_path / "ours", tmp_path / "ours" / WEIGHTS):
        assert main(["inspect", str(path)]) == 0
        assert "2D encoder with the temporal decoder of Stable Video Diffusion" in capsys.readouterr().out
    for said in ("temporal decoder of Stable Video Diffusion", "scaling factor 0.18215", "nothing is wrong"):
        assert said in told
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    assert main(["inspect", str(folder)]) == 2


def test_its_entry_in_the_table(capsys):
    with torch.device("meta"):
        values = sum(tensor.numel() for tensor in VideoAutoencoder(**SVD_AUTOENCODER.config).state_dict().values())
    assert SVD_AUTOENCODER.size_bytes == pytest.approx(4 * values, rel=0.01)
    assert main(["models"]) == 0
    assert hub.fetch_command(SVD_AUTOENCODER) in " ".join(capsys.readouterr().out.split())
