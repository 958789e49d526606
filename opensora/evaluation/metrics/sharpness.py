"""Sharpness, and the noise that may be taken for it.

A picture that is blurred already hardly changes when it is blurred again (Crete et al., 2007). Along rows and columns,
with d the differences of neighbours, and d' those after a mean over nine pixels:

    sharpness = sum max(0, d - d') / sum d          the lesser of rows and columns, so a blur in one direction shows

Noise is what a difference of two Laplacians leaves of a frame, which cancels slopes and most edges (Immerkaer, 1996):

    noise = sqrt(pi / 2) mean |x * [1 -2 1; -2 4 -2; 1 -2 1]| / 6
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.evaluation.luma import luma_levels
from opensora.evaluation.metrics.metric import Figure, Metric

_BLUR_PX = 9
_LEAST_LEVELS = 0.1  # mean difference of neighbours below which a frame is flat


class Sharpness(Metric):
    """How sharp frames are, whatever their contrast, and how noisy."""

    name = "sharpness"
    figures = (
        Figure(
            "sharpness",
            "",
            "how much of the differences of neighbouring pixels a second blur would take: about 0.2 blurred, 0.7 crisp",
            "higher",
            "what is meant to be out of focus; takes noise and blocks for detail (see noise_levels)",
        ),
        Figure(
            "noise_levels",
            "levels of 255",
            "deviation of the noise of a frame, estimated from what neither slopes nor edges explain",
            "lower",
            "coarse noise and blocks; takes fine texture for noise",
        ),
    )

    def measure(self, video: Tensor, fps: float) -> dict[str, Tensor]:
        """Means over frames; `sharpness` leaves out flat ones, and is NaN where all are."""
        self.check(video)
        luma = luma_levels(video)
        sharpness, noise = _sharpness(luma), _noise(luma)
        return {"sharpness": sharpness.double().nanmean(dim=1), "noise_levels": noise.double().mean(dim=1)}


def _sharpness(luma: Tensor) -> Tensor:
    """(B, T) of (B, T, H, W); NaN for a flat frame."""
    along_rows, along_columns = _sharpness_along(luma), _sharpness_along(luma.transpose(2, 3))
    return torch.minimum(along_rows, along_columns)


def _sharpness_along(luma: Tensor) -> Tensor:
    """(B, T), from differences of neighbours in the last dimension."""
    width = luma.shape[-1]
    padded = F.pad(luma.flatten(0, 1), (_BLUR_PX // 2, _BLUR_PX // 2), mode="replicate")
    blurred = F.avg_pool1d(padded, _BLUR_PX, stride=1).unflatten(0, luma.shape[:2])
    sharp, soft = luma.diff(dim=-1).abs(), blurred.diff(dim=-1).abs()
    lost = (sharp - soft).clamp_min(0).sum(dim=(2, 3))
    total = sharp.sum(dim=(2, 3))
    flat = total < _LEAST_LEVELS * luma.shape[-2] * (width - 1)
    return torch.where(flat, math.nan, lost / total)


def _noise(luma: Tensor) -> Tensor:
    """(B, T) of (B, T, H, W); 0 for frames smaller than 3 x 3."""
    if min(luma.shape[2:]) < 3:
        return luma.new_zeros(luma.shape[:2])
    step = torch.tensor([1.0, -2.0, 1.0], device=luma.device)
    kernel = (step[:, None] * step)[None, None]
    left = F.conv2d(luma.flatten(0, 1)[:, None], kernel).abs().mean(dim=(1, 2, 3))
    return (math.sqrt(math.pi / 2) / 6 * left).unflatten(0, luma.shape[:2])
