"""How close clips are to their references: what a codec, a format or a faster way of sampling has changed.

They are functions and no `Metric`, since two clips come in. SSIM (Wang et al., 2004) compares mean, contrast and
structure in windows of 11 x 11 pixels (Gaussian, 1.5 px), on luma x, y in levels of 255:

    (2 mean_x mean_y + c1) (2 cov_xy + c2) / (mean_x^2 + mean_y^2 + c1) (var_x + var_y + c2),
    c1 = (0.01 * 255)^2, c2 = (0.03 * 255)^2
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.evaluation.features import perceptual_distance
from opensora.evaluation.luma import luma_levels
from opensora.evaluation.metrics.metric import Figure
from opensora.evaluation.psnr import frame_psnr

_WINDOW_PX, _DEVIATION_PX = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_FRAMES_AT_ONCE = 8

FIGURES = (
    Figure(
        "psnr_db",
        "dB",
        "how small the difference of pixels is; mean over frames, about 106 for equal ones",
        "higher",
        "where it lies: noise nobody sees costs as much as a lost face; a shift by a pixel costs most of it",
    ),
    Figure(
        "ssim",
        "",
        "how alike frames are in local contrast and structure of their brightness: 1 the same",
        "higher",
        "colour; takes a shift of a pixel for a loss of structure",
    ),
    Figure(
        "perceptual_distance",
        "",
        "how far apart a network trained on ImageNet sees frames, position by position: 0 the same",
        "lower",
        "changes of a few levels, slow gradients; comparable only with itself, and not with LPIPS",
    ),
)


@torch.no_grad()
def fidelity(made: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """PSNR, SSIM and perceptual distance of clips, means over frames.

    Args:
        made: (B, 3, T, H, W) in [-1, 1]; what is beyond is cut off.
        reference: as many, of the same size.

    Returns:
        name of a figure of `FIGURES` -> (B,) float64.

    Raises:
        OpenSoraError: shapes differ, or frames are too small for SSIM.
    """
    if made.shape != reference.shape or made.ndim != 5 or made.shape[1] != 3:
        raise OpenSoraError(
            f"got clips {tuple(made.shape)} and references {tuple(reference.shape)}; "
            "give both as (B, 3, T, H, W) of one size"
        )
    made, reference = made.float().clamp(-1, 1), reference.float().clamp(-1, 1)
    frames = {
        "psnr_db": frame_psnr(made, reference),
        "ssim": frame_ssim(made, reference),
        "perceptual_distance": _frame_distance(made, reference),
    }
    return {name: values.double().mean(dim=1) for name, values in frames.items()}


def frame_ssim(made: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of every frame's luma; videos (B, 3, T, H, W) in [-1, 1] -> (B, T).

    Raises:
        OpenSoraError: frames are smaller than a window.
    """
    height, width = made.shape[3:]
    if min(height, width) < _WINDOW_PX:
        raise OpenSoraError(f"SSIM needs frames of {_WINDOW_PX}x{_WINDOW_PX} or more, got {height}x{width}")
    x, y = (luma_levels(video).flatten(0, 1)[:, None] for video in (made, reference))
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x, var_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3)).unflatten(0, (made.shape[0], -1))


def _windowed(pictures: Tensor) -> Tensor:
    """Gaussian means (N, 1, h, w) over whole windows of (N, 1, H, W)."""
    steps = torch.arange(_WINDOW_PX, device=pictures.device) - _WINDOW_PX // 2
    weights = torch.exp(-(steps**2) / (2 * _DEVIATION_PX**2))
    weights = (weights / weights.sum())[None, None]
    return F.conv2d(F.conv2d(pictures, weights[..., None, :]), weights[..., None])


def _frame_distance(made: Tensor, reference: Tensor) -> Tensor:
    """(B, T), few frames at once."""
    distance = perceptual_distance(made.device)
    pictures = [video.transpose(1, 2).flatten(0, 1)[:, :, None].split(_FRAMES_AT_ONCE) for video in (made, reference)]
    return torch.cat([distance(*pair) for pair in zip(*pictures, strict=True)]).unflatten(0, (made.shape[0], -1))
