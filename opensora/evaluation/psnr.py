"""How close pictures are, in decibels."""

import torch
from torch import Tensor


def frame_psnr(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every frame in decibels; videos (B, 3, T, H, W) in [-1, 1] -> (B, T)."""
    error = (reconstruction.float().clamp(-1, 1) - target.float()).square().mean(dim=(1, 3, 4))
    return 10 * torch.log10(4 / error.clamp_min(1e-10))
