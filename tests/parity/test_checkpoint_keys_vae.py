"""Names and shapes of the full-size autoencoder against the published ones."""

import math

import pytest
import torch

from opensora.checkpoints.key_maps import adapt_weights
from opensora.checkpoints.published import PUBLISHED
from opensora.checkpoints.published_parts import DC_AE_2_0, FLUX_AE, HUNYUAN_VAE, OPENSORA_VAE_1_3
from opensora.models.autoencoders.causal import CausalVideoAutoencoder
from opensora.models.autoencoders.dc_ae import VideoDCAutoencoder
from opensora.models.autoencoders.hunyuan import HunyuanVideoAutoencoder
from opensora.models.autoencoders.video import VideoAutoencoder
from opensora.models.identify import identify


def test_opensora_vae_1_2(golden_json):
    published = golden_json("checkpoint_keys/opensora_vae_v1_2")
    with torch.device("meta"):
        autoencoder = VideoAutoencoder(**PUBLISHED["opensora-1.2"].autoencoder.config)
    ours = {name: list(value.shape) for name, value in autoencoder.state_dict().items()}
    assert ours == {name: shape for name, (shape, _) in published["keys"].items()}
    assert len(ours) == published["num_tensors"]
    statistics = {name: shape for name, shape in ours.items() if name not in dict(autoencoder.named_parameters())}
    assert sorted(statistics) == sorted(published["buffers"])
    if "num_parameters" in published:
        counted = sum(parameter.numel() for parameter in autoencoder.parameters())
        assert published["num_parameters"] - counted in (0, sum(map(math.prod, statistics.values())))


def test_sd_vae(golden_json):
    """The published file is the image autoencoder alone; ours holds it under a prefix, beside shift and scale."""
    published = golden_json("checkpoint_keys/sd_vae_autoencoderkl")
    with torch.device("meta"):
        autoencoder = VideoAutoencoder(**PUBLISHED["opensora-1.0-hq-16x256x256"].autoencoder.config)
    ours = {name: list(value.shape) for name, value in autoencoder.state_dict().items()}
    channels = autoencoder.latent_channels
    statistics = {name: [1, channels, 1, 1, 1] for name in ("scale", "shift")}
    assert ours == {f"spatial_vae.module.{name}": shape for name, (shape, _) in published["keys"].items()} | statistics
    assert len(published["keys"]) == published["num_tensors"]
    assert not published["buffers"]
    counted = sum(parameter.numel() for parameter in autoencoder.parameters())
    assert counted == sum(torch.Size(shape).numel() for shape, _ in published["keys"].values())
    assert counted == published.get("num_parameters", counted)


@pytest.mark.parametrize(
    ("name", "cls", "part"),
    [
        ("opensora_vae_v1_3", CausalVideoAutoencoder, OPENSORA_VAE_1_3),
        ("hunyuan_vae_v2_0", HunyuanVideoAutoencoder, HUNYUAN_VAE),
        ("dc_ae_f32t4c128_v2_0", VideoDCAutoencoder, DC_AE_2_0),
    ],
)
def test_later_autoencoders(golden_json, name, cls, part):
    published = golden_json(f"checkpoint_keys/{name}")
    with torch.device("meta"):
        autoencoder = cls(**part.config)
    ours = {name: list(value.shape) for name, value in autoencoder.state_dict().items()}
    assert ours == {name: shape for name, (shape, _) in published["keys"].items()}
    assert len(ours) == published["num_tensors"]
    assert not published["buffers"] and not list(autoencoder.buffers())
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == published["num_parameters"]


def test_flux(golden_json):
    """Published in the names of latent diffusion's authors, with attention layers that are convolutions of a pixel."""
    published = golden_json("checkpoint_keys/flux_ae_2d")
    stored = {name: torch.empty(shape, device="meta") for name, (shape, _) in published["keys"].items()}
    with torch.device("meta"):
        autoencoder = VideoAutoencoder(**FLUX_AE.config)
    adapted = {name: list(value.shape) for name, value in adapt_weights(autoencoder, stored, "FLUX").items()}
    ours = {name: list(value.shape) for name, value in autoencoder.named_parameters()}
    assert adapted == ours and len(ours) == published["num_tensors"]
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == published["num_parameters"]
    found = identify(stored)
    assert found is not None and found.runner == (VideoAutoencoder.__module__, "VideoAutoencoder")
    told = {name: value for name, value in FLUX_AE.config["spatial"].items() if name != "norm_num_groups"}
    assert told.items() <= found.config.items() and "norm_num_groups" in found.unsure
