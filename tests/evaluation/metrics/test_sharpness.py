"""Blur in any direction takes sharpness, contrast does not; noise of known strength is measured."""

import math

import pytest
import torch
from known_clips import blur, motion_blur, noise, pan
from torch import Tensor

from opensora.evaluation.metrics.sharpness import Sharpness


def found(video: Tensor) -> tuple[float, float]:
    figures = Sharpness().measure(video, fps=24.0)
    return float(figures["sharpness"]), float(figures["noise_levels"])


def squares() -> Tensor:
    """A chessboard of 8 px, one frame."""
    places = torch.arange(64) // 8
    return ((places[:, None] + places) % 2 * 1.0 - 0.5).expand(1, 3, 1, -1, -1)


@pytest.mark.parametrize("worse", [blur, motion_blur], ids=["both ways", "to the side"])
def test_the_more_blurred_the_less_sharp(worse):
    sharpness = [found(worse(squares(), deviation_px))[0] for deviation_px in (0, 0.5, 1, 2, 4)]
    assert sharpness == sorted(sharpness, reverse=True)
    assert sharpness[0] > 0.8 and sharpness[-1] < 0.4


def test_contrast_is_no_sharpness():
    assert found(squares() * 0.2)[0] == pytest.approx(found(squares())[0], rel=1e-4)


@pytest.mark.parametrize("levels", [2.0, 6.0])
def test_noise_of_known_deviation(levels: float):
    # Luma weighs three channels of independent noise: its deviation is sqrt(0.299^2 + 0.587^2 + 0.114^2) of theirs.
    expected = levels * math.hypot(0.299, 0.587, 0.114)
    assert found(noise(pan(0.0), levels))[1] == pytest.approx(expected, rel=0.1)
    assert found(pan(0.0))[1] < 0.5


def test_flat_frames_have_no_sharpness_and_do_not_spoil_that_of_others():
    flat = torch.zeros(1, 3, 1, 64, 64)
    assert math.isnan(found(flat)[0]) and found(flat)[1] == 0.0
    assert found(torch.cat([flat, squares()], dim=2))[0] == pytest.approx(found(squares())[0])
