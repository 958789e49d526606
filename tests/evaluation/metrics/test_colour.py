"""Saturation and clipping of pictures whose pixels are counted."""

import pytest
import torch
from known_clips import contrast, saturated, texture
from torch import Tensor

from opensora.evaluation.metrics.colour import Colour


def found(video: Tensor) -> tuple[float, float]:
    figures = Colour().measure(video, fps=24.0)
    return float(figures["saturation"]), float(figures["clipped_share"])


def test_grey_has_no_saturation_and_red_has_all():
    assert found(torch.zeros(1, 3, 1, 4, 4)) == (0.0, 0.0)
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1, 1).expand(-1, -1, 1, 4, 4)
    assert found(red) == (1.0, 1.0)


def test_clipped_pixels_are_counted_with_any_of_their_channels():
    video = torch.zeros(1, 3, 2, 4, 5)
    video[0, 0, 0, 0, 0] = 1.0
    video[0, :, 1, 0, 0] = -1.0
    video[0, 2, 1, 3, 4] = 3.0  # beyond counts as the end
    assert found(video)[1] == pytest.approx(3 / 40)


def test_guidance_drives_both_up():
    video = texture()[None, :, None]
    shares = [found(contrast(video, times))[1] for times in (1, 2, 4)]
    assert shares[0] < 0.01 and shares[0] < shares[1] < shares[2]
    strengths = [found(saturated(video, times))[0] for times in (0, 0.5, 1, 1.5)]
    assert strengths[0] == pytest.approx(0, abs=1e-6)
    assert strengths[1] == pytest.approx(strengths[2] / 2, rel=1e-3) and strengths[2] < strengths[3]
