"""HunyuanVideo's autoencoder, as Open-Sora 2.0 runs it, against the reference: settings are read from the fixtures."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.models.autoencoders.hunyuan import HunyuanVideoAutoencoder
from opensora.models.autoencoders.posterior import Posterior

FACTOR = 0.476986  # written into the reference


def close(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours, reference, atol=2e-5, rtol=1e-4)


def build(fixture, *, space: bool = False, time: bool = False) -> HunyuanVideoAutoencoder:
    config: dict[str, Any] = fixture.meta["config"]
    known = ("block_out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
    autoencoder = HunyuanVideoAutoencoder(
        **{name: config[name] for name in known},
        temporal_compression_ratio=config["time_compression_ratio"],
        latent_space={"scaling_factor": FACTOR},
        tile_sample_size=config["sample_size"] if space else None,
        tile_sample_frames=config["sample_tsize"] if time else None,
    )
    autoencoder.load_state_dict(fixture.weights())
    return autoencoder.eval().requires_grad_(False)


def raw(autoencoder: HunyuanVideoAutoencoder, video: Tensor) -> Posterior:
    """Of any size, whole, before the scaling factor."""
    return Posterior.from_moments(autoencoder.quant_conv(autoencoder.encoder(video)))


def compare(fixture, name: str, autoencoder: HunyuanVideoAutoencoder, video: Tensor, every: Any = ...) -> None:
    posterior = autoencoder.posterior(video)
    close(posterior.mean, fixture[f"out.{name}.z_mode"])
    if f"out.{name}.post_logvar" in fixture:
        factor = 2 * torch.tensor(FACTOR).log()
        close(posterior.logvar - factor, fixture[f"out.{name}.post_logvar"])
    decoded = "decode" if f"out.{name}.decode" in fixture else "decode_sub"
    ours = autoencoder.decode_latents(fixture[f"out.{name}.z_mode"], video.shape[2])
    close(ours[every], fixture[f"out.{name}.{decoded}"])
    if f"out.{name}.latent_size" in fixture:
        assert list(autoencoder.latent_size(video.shape[2:])) == fixture[f"out.{name}.latent_size"].tolist()


def seen(fixture) -> set[str]:
    return set(fixture.under("out"))


@pytest.mark.parametrize("case", ["1", "5", "9", "tiled", "tiled_spatial5"])
def test_clip(golden, case):
    fixture = golden("vae_hunyuan_v2_0")
    kinds = r"(1|5|9|tiled|tiled_spatial5)\.(decode|z_mode|post_logvar|latent_size)"
    assert all(re.fullmatch(kinds, name) for name in seen(fixture))
    video = fixture["in.tiled.x"][:, :, :5] if case == "tiled_spatial5" else fixture[f"in.{case}.x"]
    compare(fixture, case, build(fixture, space="tiled" in case, time=case == "tiled"), video)


@pytest.mark.parametrize("case", ["both", "spatial", "temporal", "temporal_border"])
def test_tails_that_fill_no_tile(golden, case):
    fixture = golden("vae_hunyuan_v2_0_tiled")
    cases = fixture.meta["cases"]
    assert {name.split(".")[0] for name in seen(fixture) if not name.startswith("plain_")} == cases.keys()
    settings = cases[case]
    autoencoder = build(fixture, space=settings["use_spatial_tiling"], time=settings["use_temporal_tiling"])
    every = (..., slice(None, None, 2), slice(None, None, 2))
    every = every if case == "both" else (slice(None), slice(None), *[slice(None, None, 2)] * 3)
    compare(fixture, case, autoencoder, fixture["in.x"][:, :, : settings["frames"]], every)


@torch.no_grad()
def test_sizes_off_the_grid(golden):
    """The reference rounds them up in space and down in time; ours refuses what would come back with another size."""
    fixture = golden("vae_hunyuan_v2_0_tiled")
    autoencoder, sizes = build(fixture), fixture.meta["plain_T_H_W"]
    found = {name for name in seen(fixture) if name.startswith("plain_")}
    names = ["plain_" + "_".join(map(str, size)) for size in sizes]
    assert found == {f"{name}.{kind}" for name in names for kind in ("z_mode", "decode", "latent_size")}
    for name, (num_frames, height, width) in zip(names, sizes, strict=True):
        video = fixture["in.x"][:, :, :num_frames, :height, :width]
        latents = fixture[f"out.{name}.z_mode"]
        close(raw(autoencoder, video).mode() * FACTOR, latents)
        close(autoencoder.decoder(autoencoder.post_quant_conv(latents / FACTOR)), fixture[f"out.{name}.decode"])
        rounded = [(num_frames - 1) // 4 + 1, -(-height // 8), -(-width // 8)]
        assert fixture[f"out.{name}.latent_size"].tolist() == rounded == list(latents.shape[2:])
        with pytest.raises(OpenSoraError, match="multiple of"):
            autoencoder.encode_video(video)


@torch.no_grad()
def test_eight_frames_to_a_latent_frame(golden):
    fixture = golden("vae_hunyuan_v2_0_t8")
    autoencoder, lengths = build(fixture), fixture.meta["frames"]
    kinds = {f"{n}.{kind}" for n in lengths for kind in ("z_mode", "decode", "latent_size")}
    assert seen(fixture) == kinds | {"posterior_kl"}
    for num_frames in lengths:
        video = fixture[f"in.{num_frames}.x"]
        if num_frames % 8 == 1:
            compare(fixture, str(num_frames), autoencoder, video)
            continue
        latents = fixture[f"out.{num_frames}.z_mode"]
        close(raw(autoencoder, video).mode() * FACTOR, latents)
        decoded = autoencoder.decoder(autoencoder.post_quant_conv(latents / FACTOR))
        close(decoded, fixture[f"out.{num_frames}.decode"])
        assert fixture[f"out.{num_frames}.latent_size"].tolist() == list(latents.shape[2:])
        with pytest.raises(OpenSoraError, match=r"1 more than a multiple of 8.*1 or 9"):
            autoencoder.encode_video(video)
    close(raw(autoencoder, fixture[f"in.{lengths[-1]}.x"]).kl(), fixture["out.posterior_kl"])
