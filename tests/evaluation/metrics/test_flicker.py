"""Flicker of known strength is found, and what only moves or fades is none."""

import math

import pytest
import torch
from known_clips import flicker, noise, pan, slow_flicker, texture
from torch import Tensor

from opensora.errors import OpenSoraError
from opensora.evaluation.metrics.flicker import Flicker


def found(video: Tensor) -> tuple[float, float]:
    figures = Flicker().measure(video, fps=24.0)
    return float(figures["flicker_levels"]), float(figures["still_share"])


def test_a_still_clip_has_none():
    assert found(pan(0.0)) == (0.0, 1.0)


@pytest.mark.parametrize("levels", [2.0, 8.0, 24.0])
def test_frames_darker_by_turns_flicker_by_as_much(levels: float):
    strength, share = found(flicker(pan(0.0), levels))
    assert strength == pytest.approx(levels, rel=0.01) and share > 0.95
    # Every second step is a change: half as much.
    assert found(slow_flicker(pan(0.0), levels))[0] == pytest.approx(levels / 2, rel=0.01)


def test_a_pan_is_no_flicker():
    strength, share = found(pan(3.0))
    assert math.isnan(strength) and share < 0.01


def test_beside_something_that_moves_the_still_half_is_read():
    video = torch.cat([pan(0.0, width=64), pan(3.0, width=64, seed=1)], dim=4)
    assert found(video)[0] < 0.1
    strength, share = found(flicker(video, 8.0))
    assert strength == pytest.approx(8.0, rel=0.02) and 0.3 < share < 0.5


def test_light_that_fades_is_no_flicker_and_noise_is():
    fading = pan(0.0) * torch.linspace(1.0, 0.3, 9).view(1, 1, -1, 1, 1)
    assert found(fading)[0] < 0.01
    few, many = found(noise(pan(0.0), 2.0))[0], found(noise(pan(0.0), 6.0))[0]
    assert 0.5 < few < many / 2


def test_clips_of_a_batch_are_read_one_by_one():
    figures = Flicker().measure(torch.cat([flicker(pan(0.0), 8.0), pan(3.0), pan(0.0)]), 24.0)["flicker_levels"]
    assert figures.dtype == torch.float64
    assert [round(value) if value == value else None for value in figures.tolist()] == [8, None, 0]


def test_two_frames_cannot_go_to_and_fro():
    with pytest.raises(OpenSoraError, match="flicker compares frames, but was given clips with 2 of them; give 3"):
        found(texture()[None, :, None].expand(-1, -1, 2, -1, -1))
