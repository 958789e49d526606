"""Flicker: how much the brightness of places goes to and fro that do not move.

Total variation over time counts every change, those that lead somewhere too: lights that fade, a shadow that passes. So
what the change comes to in the end is taken off, within windows of five frames, and only places are read where optical
flow finds no motion in any step of the window, nor near them: a pan is no flicker.

    flicker = mean of (sum_t |x_t+1 - x_t| - |x_last - x_first|) / (window - 1)      over windows and their still places
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.evaluation.luma import luma_levels
from opensora.evaluation.metrics.metric import Figure, Metric
from opensora.evaluation.optical_flow import OpticalFlow, optical_flow

_WINDOW = 5
_STILL_PX = 0.3  # per frame; the flow is right to a tenth of a pixel or better
_AROUND_MOTION_PX = 4  # flow blurs where moving meets still
_LEAST_SHARE = 0.01


class Flicker(Metric):
    """Variation over time in places that do not move."""

    name = "flicker"
    figures = (
        Figure(
            "flicker_levels",
            "levels of 255",
            "how much the brightness of still places goes to and fro from one frame to the next",
            "lower",
            "flicker of what moves (see warping_error_levels), of colour at equal brightness, and slower than five "
            "frames; takes noise and water for flicker",
        ),
        Figure(
            "still_share",
            "",
            "share of all places and moments that flicker_levels was read from",
            None,
            "flat regions that move without a trace, which count as still",
        ),
    )
    least_frames = 3

    def measure(self, video: Tensor, fps: float) -> dict[str, Tensor]:
        """`flicker_levels` is NaN for a clip of which less than 1 % is still."""
        self.check(video)
        found = [_flicker_of(luma, optical_flow(clip)) for clip, luma in zip(video, luma_levels(video), strict=True)]
        flicker, share = torch.tensor(found, dtype=torch.float64).unbind(dim=1)
        return {"flicker_levels": flicker, "still_share": share}


def _flicker_of(luma: Tensor, flow: OpticalFlow) -> tuple[float, float]:
    """Flicker and share of what is still, of luma (T, H, W)."""
    steps = min(_WINDOW, len(luma)) - 1
    windows = luma.cpu().unfold(0, steps + 1, 1)  # (windows, H, W, frames)
    variation = windows.diff(dim=-1).abs().sum(dim=-1) - (windows[..., -1] - windows[..., 0]).abs()
    still = _still(flow).unfold(0, steps, 1).all(dim=-1)
    share = float(still.double().mean())
    if share < _LEAST_SHARE:
        return float("nan"), share
    return float(variation[still].double().mean()) / steps, share


def _still(flow: OpticalFlow) -> Tensor:
    """(T - 1, H, W), true where neither a place nor one beside it moves."""
    moves = (flow.speed > _STILL_PX).float()[:, None]
    return F.max_pool2d(moves, 2 * _AROUND_MOTION_PX + 1, stride=1, padding=_AROUND_MOTION_PX)[:, 0] == 0
