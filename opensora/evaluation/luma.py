"""Brightness of pixels as television weighs it (ITU-R BT.601), on the scale of 8-bit files."""

import torch
from torch import Tensor

_WEIGHTS = (0.299, 0.587, 0.114)


def luma_levels(video: Tensor) -> Tensor:
    """Videos (B, 3, T, H, W) in [-1, 1] -> (B, T, H, W) from 0 (black) to 255 (white), float32, not rounded."""
    weights = torch.tensor(_WEIGHTS, dtype=torch.float32, device=video.device)
    return torch.einsum("bcthw,c->bthw", video.float().clamp(-1, 1), weights) * 127.5 + 127.5
