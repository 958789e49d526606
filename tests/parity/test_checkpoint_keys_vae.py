"""Names and shapes of the full-size autoencoder against the published ones."""

import math

import torch

from opensora.checkpoints.published import PUBLISHED
from opensora.models.autoencoders.video import VideoAutoencoder


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
