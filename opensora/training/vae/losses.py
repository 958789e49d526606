"""Terms of the autoencoder's loss, one value a clip, and what it has to beat.

Letters: B clips, C channels, T frames, H, W pixels or latent cells.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.models.autoencoders.posterior import Posterior

Reduction = Literal["mean", "sum"]
"""Over what a clip's errors are averaged: "mean" over all of its values; "sum" adds up the values of a frame and
averages over frames, and adds up the divergence of a clip, as Open-Sora 1.2 was trained."""


def reconstruction_loss(
    reconstruction: Tensor, target: Tensor, *, mse_weight: float, weights: Tensor | None, reduction: Reduction
) -> Tensor:
    """|error| + `mse_weight` * error^2.

    Args:
        reconstruction: (B, C, T, H, W).
        target: same shape.
        mse_weight: of squared errors.
        weights: (B, 1, T, H, W), of every position; None for 1.
        reduction: see `Reduction`.

    Returns:
        (B,)
    """
    error = (reconstruction.float() - target.float()).abs()
    error = error + mse_weight * error.square()
    return per_clip(error if weights is None else error * weights, reduction)


def per_clip(values: Tensor, reduction: Reduction) -> Tensor:
    """(B, C, T, H, W) -> (B,)."""
    return values.flatten(1).mean(dim=1) if reduction == "mean" else values.sum(dim=(1, 3, 4)).mean(dim=1)


def kl_loss(posterior: Posterior, reduction: Reduction) -> Tensor:
    """Divergence of a posterior (B, C, ...) from the standard normal, a value or a clip; (B,)."""
    divergence = posterior.kl()
    return divergence / posterior.mean[0].numel() if reduction == "mean" else divergence


def critic_hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What a critic minimises: real patches above 1, made ones below -1; (B, 1, ...) logits -> (B,)."""
    return 0.5 * (F.relu(1 - real_logits) + F.relu(1 + fake_logits)).flatten(1).mean(dim=1)


def adversarial_loss(fake_logits: Tensor) -> Tensor:
    """What the autoencoder minimises against a critic: minus the score of what it made; (B, 1, ...) -> (B,)."""
    return -fake_logits.flatten(1).mean(dim=1)


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Weight that gives two losses equally long gradients at the decoder's last layer (Esser et al., 2021).

    Args:
        reconstruction: scalar loss that sets the length.
        adversarial: scalar loss to be weighted.
        last_layer: weights that both depend on.

    Returns:
        |grad reconstruction| / |grad adversarial|, scalar in [0, 10^4], without a gradient.
    """
    lengths = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    ]
    return (lengths[0] / (lengths[1] + 1e-4)).clamp(0, 1e4).detach()


def bilinear_reconstruction(video: Tensor, factor: int) -> Tensor:
    """A video (B, 3, T, H, W) made `factor` times smaller (with antialiasing) and as large again, frame by frame.

    It keeps three numbers of every factor x factor pixels: what an autoencoder has to beat.
    """
    frames = video.transpose(1, 2).flatten(0, 1)
    small = F.interpolate(frames, scale_factor=1 / factor, mode="bilinear", antialias=True)
    large = F.interpolate(small, size=frames.shape[2:], mode="bilinear")
    return large.unflatten(0, (len(video), -1)).transpose(1, 2)
