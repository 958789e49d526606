"""Drift: how unlike its beginning a clip has become to a network trained on ImageNet (`evaluation.features`).

    drift = 1 - cos(first frame, last frame)

One vector stands for a whole frame, since it says what is there rather than where: of what was tried on real frames,
it lay farthest from a pan or a zoom when it met another clip (docs/log.md). 0 is the same picture; a pan by a fifth of
the frame is about 0.15, the picture of another clip 0.7.
"""

import torch
from torch import Tensor

from opensora.evaluation.features import frame_features
from opensora.evaluation.metrics.metric import Figure, Metric


class Drift(Metric):
    """Change of appearance over a clip, and the largest from one frame to the next."""

    name = "drift"
    figures = (
        Figure(
            "drift",
            "",
            "how unlike the first frame the last one looks to a network: 0 the same, 0.7 another picture",
            "lower",
            "why: the subject changes, leaves, or the camera turns to something else; blur and noise that come count "
            "too; whatever comes and goes in between",
        ),
        Figure(
            "largest_step",
            "",
            "the same between two frames that follow each other, where it is largest: a cut, a jump, a flash",
            "lower",
            "a cut that is meant; fast motion counts a little",
        ),
    )
    least_frames = 2

    def measure(self, video: Tensor, fps: float) -> dict[str, Tensor]:
        """Of every clip; the subject is whatever fills its frames."""
        self.check(video)
        features = frame_features(video).double()
        steps = _unlike(features[:, :-1], features[:, 1:])
        return {"drift": _unlike(features[:, 0], features[:, -1]), "largest_step": steps.amax(dim=1)}


def _unlike(a: Tensor, b: Tensor) -> Tensor:
    """1 - cosine of vectors (..., D), not below 0."""
    return (1 - torch.cosine_similarity(a, b, dim=-1)).clamp_min(0)
