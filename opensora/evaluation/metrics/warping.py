"""Flow-warped error: what is left of the difference of two frames when one is moved onto the other (Lai et al., 2018).

Every frame is drawn from the next one along the optical flow; places that are hidden in it (`OpticalFlow.visible`) are
left out. What only moved costs nothing. What boils, flickers, melts or changes its texture does.
"""

import torch
from torch import Tensor

from opensora.evaluation.metrics.metric import Figure, Metric
from opensora.evaluation.optical_flow import follow, optical_flow


class Warping(Metric):
    """Error of frames drawn from the ones after them along the optical flow."""

    name = "warping"
    figures = (
        Figure(
            "warping_error_levels",
            "levels of 255",
            "mean difference of a pixel's colour from where it is a frame later, over places seen in both",
            "lower",
            "a still or blurred clip, in which nothing can go wrong; takes noise, fading light and reflections for "
            "errors, and fine texture that moves by parts of a pixel a little",
        ),
        Figure(
            "hidden_share",
            "",
            "share of the places of a frame that the next one does not show",
            None,
            "why: things pass each other, leave the picture, change beyond recognition, or move too fast for the flow",
        ),
        Figure(
            "most_hidden_share",
            "",
            "the same of the two frames that have least in common: nearly 1 at a cut",
            "lower",
            "a cut that is meant, a flash; a cut between pictures without texture",
        ),
    )
    least_frames = 2

    def measure(self, video: Tensor, fps: float) -> dict[str, Tensor]:
        """`warping_error_levels` is NaN where nothing is seen in two frames."""
        self.check(video)
        found = torch.tensor([_error_of(clip.cpu().float()) for clip in video], dtype=torch.float64)
        return dict(zip((figure.name for figure in self.figures), found.unbind(dim=1), strict=True))


def _error_of(clip: Tensor) -> tuple[float, float, float]:
    """Error, share of what is hidden, and the largest of any two frames."""
    flow = optical_flow(clip)
    frames = clip.movedim(1, 0)
    error = (follow(frames[1:], flow.forward, "bicubic").clamp(-1, 1) - frames[:-1]).abs().mean(dim=1)
    hidden = 1 - flow.visible.double().mean(dim=(1, 2))
    return float(error[flow.visible].double().mean()) * 127.5, float(hidden.mean()), float(hidden.max())
