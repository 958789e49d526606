"""How much moves, how fast, and how evenly, by optical flow.

Unevenness follows every place along its way: u is its speed in a step, v that of the place it came to in the next one.

    unevenness = sum |v - u| / sum (|u| + |v|) / 2      over steps and moving places that are seen in both

0 is a steady motion. Where it stops and goes by turns, or is thrown back every frame, it is 2, the most there is.
"""

import math

import torch
from torch import Tensor

from opensora.evaluation.metrics.metric import Figure, Metric
from opensora.evaluation.optical_flow import OpticalFlow, follow, optical_flow

_MOVES_PX = 1.0  # per frame: ten times as much as the flow may be wrong by
_LEAST_SHARE = 0.01
_FROZEN_PX = 0.1  # per frame: about as good as the flow is
_FASTEST = 0.05


class Motion(Metric):
    """Amount of motion and its evenness."""

    name = "motion"
    figures = (
        Figure(
            "motion_px_per_frame",
            "px/frame",
            "mean speed of all places of the picture from one frame to the next",
            None,
            "who moves: the camera or things; flat regions; takes noise and flicker of texture for some motion",
        ),
        Figure("motion_px_per_s", "px/s", "the same in a second, as shown", None, "as motion_px_per_frame"),
        Figure(
            "fastest_px_per_frame",
            "px/frame",
            "mean speed of the fastest 5 % of the places, however little of the picture moves",
            None,
            "things smaller than 5 % of the picture, partly; motion of more than some 10 % of the picture a frame",
        ),
        Figure(
            "unevenness",
            "",
            "how much the speed of moving places changes from step to step, relative to it: 0 steady, 2 stop and go",
            "lower",
            "motion that is meant to be sudden; what moves less than a pixel a frame",
        ),
        Figure(
            "frozen_share",
            "",
            "share of the steps between frames in which nothing moves: frames shown twice, or a picture that stands",
            None,
            "things smaller than 5 % of the picture, or slower than a tenth of a pixel a frame",
        ),
    )
    least_frames = 2

    def measure(self, video: Tensor, fps: float) -> dict[str, Tensor]:
        """`unevenness` is NaN for clips of two frames, and where less than 1 % of the places move a pixel a frame."""
        self.check(video)
        flows = [optical_flow(clip) for clip in video]
        mean = torch.stack([flow.speed.double().mean() for flow in flows])
        fastest = [_fastest(flow) for flow in flows]
        return {
            "motion_px_per_frame": mean,
            "motion_px_per_s": mean * fps,
            "fastest_px_per_frame": torch.stack([one.mean() for one in fastest]),
            "unevenness": torch.stack([_unevenness(flow) for flow in flows]),
            "frozen_share": torch.stack([(one < _FROZEN_PX).double().mean() for one in fastest]),
        }


def _fastest(flow: OpticalFlow) -> Tensor:
    """(T - 1,) mean speed of the fastest places of each step."""
    speeds = flow.speed.flatten(1)
    return speeds.topk(math.ceil(speeds.shape[1] * _FASTEST), sorted=False).values.double().mean(dim=1)


def _unevenness(flow: OpticalFlow) -> Tensor:
    before = flow.forward[:-1]
    read = torch.cat([flow.forward[1:], flow.visible[1:, ..., None].float()], dim=-1)
    after, seen_after = follow(read.movedim(-1, 1), before, "bilinear").movedim(1, -1).split([2, 1], dim=-1)
    seen = flow.visible[:-1] & (seen_after[..., 0] > 0.5)
    speeds = (before.norm(dim=-1) + after.norm(dim=-1)) / 2
    counted = seen & (speeds > _MOVES_PX)
    if len(before) == 0 or float(counted.double().mean()) < _LEAST_SHARE:
        return torch.tensor(math.nan, dtype=torch.float64)
    return (after - before).norm(dim=-1)[counted].double().sum() / speeds[counted].double().sum()
