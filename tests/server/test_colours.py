"""What latents look like: of the bundled models from the first clip on, of others after one."""

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_pipeline import make_autoencoder

from opensora.checkpoints.components import load_component
from opensora.checkpoints.published import BUNDLED
from opensora.errors import OpenSoraError
from opensora.models.autoencoders.latent_rgb import LatentRgb
from opensora.models.autoencoders.latent_space import LatentSpace
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.server.colours import KNOWN, LatentColours, name_of
from opensora.toybox.specs import sample_specs
from opensora.toybox.world import render


def bundled() -> VideoAutoencoder:
    return load_component(BUNDLED["toybox"].folder / "autoencoder", VideoAutoencoder, torch.float32)


@pytest.fixture(scope="module")
def codec() -> VideoAutoencoder:
    return bundled()


def decoded(codec: VideoAutoencoder, num_clips: int = 24) -> tuple[torch.Tensor, np.ndarray]:
    """Latents (C, T', H', W') of clips that no colours were fitted to, one after the other, and their frames."""
    video, _ = render(sample_specs(num_clips, seed=1, split="held_out"))
    with torch.no_grad():
        latents = codec.encode_video(video)
        pixels = codec.decode_latents(latents, video.shape[2])
    frames = torch.cat(list(((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)), dim=1)
    return torch.cat(list(latents), dim=1), frames.permute(1, 2, 3, 0).numpy()


def agreement(pictures: np.ndarray, frames: np.ndarray) -> list[float]:
    """The correlation of each colour with the frames, made as small as the pictures."""
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float()
    small = F.adaptive_avg_pool3d(pixels, pictures.shape[:3])[0].flatten(1).numpy()
    shown = pictures.transpose(3, 0, 1, 2).reshape(3, -1)
    return [float(np.corrcoef(seen, meant)[0, 1]) for seen, meant in zip(shown, small, strict=True)]


@pytest.mark.slow
def test_the_bundled_models_colours_are_known(codec: VideoAutoencoder, tmp_path: Path):
    colours = LatentColours(tmp_path).of(codec)
    assert colours is not None
    latents, frames = decoded(codec)
    pictures = colours.pictures(latents)
    assert pictures.shape == (*latents.shape[1:], 3) and pictures.dtype == np.uint8
    assert min(agreement(pictures, frames)) > 0.8
    assert abs(pictures.mean() - frames.mean()) < 10  # as bright


def test_every_bundled_model_is_among_them(codec: VideoAutoencoder):
    known = json.loads(resources.files("opensora.server").joinpath(KNOWN).read_text())
    assert known.keys() == {name_of(codec)}  # toybox-iddpm has none of its own
    assert all(not (model.folder / "autoencoder").exists() for name, model in BUNDLED.items() if name != "toybox")


def test_other_weights_have_other_colours(tmp_path: Path):
    other = bundled()
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    assert LatentColours(tmp_path).of(other) is None
    assert LatentColours(tmp_path).of(make_autoencoder()) is None


def test_other_factors_make_other_numbers_of_one_picture(codec: VideoAutoencoder, tmp_path: Path):
    other = bundled()
    assert name_of(other) == name_of(codec)
    other.override_latent_space(LatentSpace(scaling_factor=0.5))
    assert LatentColours(tmp_path).of(other) is None


def test_colours_are_learnt_of_a_clip_and_kept(tmp_path: Path):
    codec, colours = make_autoencoder(), LatentColours(tmp_path)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(codec.latent_channels, 3, 4, 6, generator=generator)
    frames = torch.randint(0, 255, (9, 32, 48, 3), generator=generator, dtype=torch.uint8).numpy()
    colours.learn(codec, latents, frames)
    learnt = colours.of(codec)
    assert learnt == LatentColours(tmp_path).of(codec) == LatentRgb.fit(latents, frames)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_model_that_takes_anothers_place_is_not_taken_for_it(codec: VideoAutoencoder, tmp_path: Path):
    """Python gives the addresses of what is gone to what comes."""
    colours = LatentColours(tmp_path)
    for _ in range(3):
        other = bundled()
        with torch.no_grad():
            next(other.parameters()).add_(1.0)
        assert colours.of(other) is None
        del other
        assert colours.of(bundled()) == colours.of(codec) is not None


def test_colours_that_are_sums_of_latents_are_found(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    latents = torch.rand(2, 6, 8, 8, generator=generator) * 0.3
    right = torch.cat([latents[1, ..., 1:], latents[1, ..., -1:]], dim=-1)  # the second channel of the place beside it
    meant = torch.stack([0.5 + latents[0], 0.3 - latents[1], 0.2 + right], dim=-1)
    frames = (meant * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    pictures = LatentRgb.fit(latents, frames).pictures(latents)
    assert np.abs(pictures.astype(int) - frames).max() <= 3


def test_latents_of_another_width_are_refused():
    colours = LatentRgb.fit(torch.zeros(4, 2, 3, 3), np.zeros((2, 3, 3, 3), np.uint8))
    with pytest.raises(OpenSoraError, match="got latents of 8 channels, expected 4"):
        colours.pictures(torch.zeros(8, 2, 3, 3))
