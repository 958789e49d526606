"""Each term of the autoencoder's loss on values worked out by hand."""

import math

import pytest
import torch
from torch import nn

from opensora.evaluation.psnr import frame_psnr
from opensora.models.autoencoders.posterior import Posterior
from opensora.training.vae.losses import (
    adaptive_weight,
    adversarial_loss,
    bilinear_reconstruction,
    critic_hinge_loss,
    kl_loss,
    reconstruction_loss,
)

SHAPE = (2, 3, 4, 5, 6)


def test_errors_are_absolute_and_squared_and_weighted():
    target = torch.zeros(SHAPE)
    made = torch.full(SHAPE, 0.5)
    made[1] = -1.0
    options = {"mse_weight": 2.0, "reduction": "mean"}
    assert reconstruction_loss(made, target, weights=None, **options).tolist() == [0.5 + 2 * 0.25, 1 + 2]
    weights = torch.zeros(2, 1, 4, 5, 6)
    weights[:, :, :, 0] = 5.0  # a fifth of the rows, five times
    torch.testing.assert_close(reconstruction_loss(made, target, weights=weights, **options), torch.tensor([1.0, 3.0]))


def test_a_sum_adds_up_the_values_of_a_frame_and_averages_frames():
    made = torch.zeros(SHAPE)
    made[0, :, 0] = 1.0  # one frame of four
    found = reconstruction_loss(made, torch.zeros(SHAPE), mse_weight=0.0, weights=None, reduction="sum")
    assert found.tolist() == [3 * 5 * 6 / 4, 0.0]


def test_divergence_from_the_standard_normal():
    mean, logvar = torch.ones(2, 4, 3), torch.zeros(2, 4, 3)
    logvar[1] = math.log(4.0)
    expected = torch.tensor([0.5, 0.5 * (1 + 4 - 1 - math.log(4.0))])
    torch.testing.assert_close(kl_loss(Posterior(mean, logvar), "mean"), expected)
    torch.testing.assert_close(kl_loss(Posterior(mean, logvar), "sum"), 12 * expected)


def test_the_hinge_stops_where_the_critic_is_sure():
    real = torch.tensor([2.0, 0.5]).view(2, 1, 1, 1, 1)
    fake = torch.tensor([-2.0, 0.5]).view(2, 1, 1, 1, 1)
    assert critic_hinge_loss(real, fake).tolist() == [0.0, 0.5 * (0.5 + 1.5)]
    assert adversarial_loss(fake).tolist() == [2.0, -0.5]


def test_two_losses_pull_at_the_last_layer_alike():
    layer = nn.Parameter(torch.tensor([1.0, 2.0]))
    reconstruction = (layer * torch.tensor([3.0, 4.0])).sum()  # gradient of length 5
    adversarial = (layer * torch.tensor([0.0, -2.0])).sum()  # of length 2
    weight = adaptive_weight(reconstruction, adversarial, layer)
    assert float(weight) == pytest.approx(2.5, rel=1e-3) and not weight.requires_grad
    # Against nearly nothing it does not grow without bound.
    assert float(adaptive_weight(1e3 * reconstruction, 0 * adversarial, layer)) == 1e4
    (reconstruction + weight * adversarial).backward()  # both graphs are still there
    torch.testing.assert_close(layer.grad, torch.tensor([3.0, 4.0 - 5.0]), rtol=0, atol=1e-3)


def test_decibels_of_every_frame():
    target = torch.zeros(1, 3, 2, 4, 4)
    made = target.clone()
    made[:, :, 0], made[:, :, 1] = 0.2, 3.0  # what lies outside of [-1, 1] is cut off
    assert frame_psnr(made, target)[0].tolist() == pytest.approx([20.0, 10 * math.log10(4)])


def test_bilinear_pictures_keep_what_is_flat_and_lose_what_is_fine():
    flat = torch.full((1, 3, 2, 16, 24), 0.3)
    torch.testing.assert_close(bilinear_reconstruction(flat, 8), flat)
    checks = (torch.arange(16)[:, None] + torch.arange(24)) % 2 * 2.0 - 1
    made = bilinear_reconstruction(checks.expand(1, 3, 2, 16, 24), 8)
    assert made.abs().max() < 0.05
