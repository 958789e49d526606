"""Saturation, and the share of pixels at the ends of their range: too much guidance drives both up."""

from torch import Tensor

from opensora.evaluation.metrics.metric import Figure, Metric

_END = 1 - 1.5 / 127.5  # within one level and a half of black or full: files round, and so do colour spaces


class Colour(Metric):
    """How strong colours are, and how much of the picture is at the end of what a screen can show."""

    name = "colour"
    figures = (
        Figure(
            "saturation",
            "",
            "mean difference of a pixel's largest and smallest channel: 0 grey, 1 pure colours",
            None,
            "whether such colours are right: a poppy field is saturated, fog is not",
        ),
        Figure(
            "clipped_share",
            "",
            "share of pixels with a channel at either end of its range; much of it is the mark of too much guidance",
            "lower",
            "what is black, white or a pure colour rightly: night, snow, black bars, drawings",
        ),
    )

    def measure(self, video: Tensor, fps: float) -> dict[str, Tensor]:
        """Over all pixels of a clip."""
        self.check(video)
        video = video.float().clamp(-1, 1)
        chroma = (video.amax(dim=1) - video.amin(dim=1)) / 2
        clipped = (video.abs() >= _END).any(dim=1)
        return {
            "saturation": chroma.double().mean(dim=(1, 2, 3)),
            "clipped_share": clipped.double().mean(dim=(1, 2, 3)),
        }
