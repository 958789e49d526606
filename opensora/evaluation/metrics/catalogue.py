"""All metrics of single clips, by name, and all figures of a batch at once."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.evaluation.metrics.colour import Colour
from opensora.evaluation.metrics.drift import Drift
from opensora.evaluation.metrics.flicker import Flicker
from opensora.evaluation.metrics.metric import Metric
from opensora.evaluation.metrics.motion import Motion
from opensora.evaluation.metrics.sharpness import Sharpness
from opensora.evaluation.metrics.warping import Warping
from opensora.evaluation.optical_flow import forget_flow
from opensora.settings import nearest_name

METRICS: tuple[Metric, ...] = (Flicker(), Warping(), Motion(), Drift(), Sharpness(), Colour())


def metrics_of(names: Sequence[str]) -> tuple[Metric, ...]:
    """Metrics by name, each once, in this order.

    Raises:
        OpenSoraError: there is none of that name.
    """
    known = {metric.name: metric for metric in METRICS}
    for name in names:
        if name not in known:
            raise OpenSoraError(f"unknown metric {name!r}{nearest_name(name, known)}")
    return tuple(known[name] for name in dict.fromkeys(names))


def measure_all(video: Tensor, fps: float, metrics: Sequence[Metric] = METRICS) -> dict[str, Tensor]:
    """Figures of several metrics, clip by clip, so that memory is that of one.

    Args:
        video: (B, 3, T, H, W) in [-1, 1].
        fps: frames per second as shown.
        metrics: which.

    Returns:
        name of a figure -> (B,) float64; NaN where a clip has nothing that it could be measured on.

    Raises:
        OpenSoraError: no clips, too few frames for one of them, no frame rate, or what one of them needs is missing.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise OpenSoraError(f"clips of {fps:g} frames per second were given; give a rate above 0")
    for metric in metrics:
        metric.check(video)
    try:
        found = [_measure_clip(clip, fps, metrics) for clip in video.float().split(1)]
    finally:
        forget_flow()
    return {name: torch.cat([figures[name] for figures in found]) for name in found[0]}


def _measure_clip(clip: Tensor, fps: float, metrics: Sequence[Metric]) -> dict[str, Tensor]:
    return {name: figure for metric in metrics for name, figure in metric.measure(clip, fps).items()}
